"""Audit the packages in .venv for known vulnerabilities with pip-audit, from an environment of its own; says plainly what was not audited.

Fails if a vulnerability is known. Where pip-audit cannot be installed or the advisories cannot be reached, nothing is known: that is said,
and is no failure.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

PLACE = Path(".venv/audit")
PURELIB = "import sysconfig; print(sysconfig.get_paths()['purelib'])"


def installed():
    """Install pip-audit unless it is there; the reason why that did not work, else None."""
    if (PLACE / "bin/pip-audit").exists():
        return None
    venv.create(PLACE, with_pip=True)
    pip = [PLACE / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q", "pip-audit"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"it cannot be installed ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})"


def skipped(why):
    """Say that there was no audit."""
    print(f"pip-audit: SKIPPED, nothing was audited: {why}")
    sys.exit(0)


def main():
    """Audit, and print one line, with one more for each vulnerability."""
    if why := installed():
        skipped(why)
    packages = subprocess.run([".venv/bin/python", "-c", PURELIB], capture_output=True, text=True, check=True).stdout.strip()
    command = [PLACE / "bin/pip-audit", "--path", packages, "--progress-spinner", "off", "-f", "json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        skipped((run.stderr.strip().splitlines() or ["no answer"])[-1])
    audited = [one for one in found if "skip_reason" not in one]
    if not audited:
        skipped(f"no advisories to be had for any of {len(found)} packages, as where the index is a mirror without them")
    faults = [(one["name"], one["version"], fault["id"], fault["fix_versions"]) for one in audited for fault in one["vulns"]]
    print(f"pip-audit: {len(audited)} of {len(found)} packages audited, {len(faults)} known vulnerabilities")
    for name, version, fault, fixed in faults:
        print(f"  {name} {version}: {fault}, fixed in {', '.join(fixed) or 'no version yet'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
