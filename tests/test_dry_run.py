"""The dry run: its process, its faults, and what it lets through."""

from __future__ import annotations

import os
import signal

import nnsight
import pytest
import torch
from conftest import WIDTH, make_module, make_tokenizer

from nnato.dry_run import DryRunServer
from nnato.errors import ModelError, RemoteError
from nnato.trace import ATOTrace, TransformersModel

IDS = torch.tensor([[1, 8, 9, 30, 5, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_module("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weightless(folder):
    return TransformersModel(str(folder), task="text-generation", tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def server(folder):
    with DryRunServer(folder) as server:
        yield server


def test_bytes_are_counted_and_the_package_is_absent(server, weightless):
    with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
        import importlib.util

        residual = t.residual(2).save()
        found = nnsight.save([importlib.util.find_spec(name) is not None for name in ("nnsight", "psutil")])
    assert found == [True, True]
    assert residual.shape == (1, 6, WIDTH)
    assert residual.numel() * 4 < server.received < residual.numel() * 4 + 4096
    assert 1000 < server.sent < 50_000
    with pytest.raises(RemoteError, match="No module named 'nnato'"):  # noqa: SIM117
        with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
            import nnato.corpus

            name = nnsight.save(nnato.corpus.__name__)
    assert "name" not in locals()


def test_sessions_run_as_one_request_and_sources_do_not_linger(server, weightless):
    for scale in (1.0, 3.0):
        with weightless.session(backend=server.backend(weightless)):
            total = 0
            for row in (0, 1):
                with weightless.trace(input_ids=IDS):
                    x = weightless.model.layers[1].output
                total = total + (row + 1) * scale * x.double().sum()
            total = nnsight.save(total.detach())
        if scale == 1.0:
            first = total
    torch.testing.assert_close(total, 3 * first)


def test_what_cannot_be_read_back_safely_is_refused(server, weightless):
    with pytest.raises(RemoteError, match=r"of these only, not all of \{'kept': 'Fraction'\}"):  # noqa: SIM117
        with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
            from fractions import Fraction

            t.logits.sum()
            kept = nnsight.save(Fraction(1, 2))
    assert "kept" not in locals()


def test_half_precision_runs_under_autocast(folder, weightless):
    with DryRunServer(folder, torch.bfloat16) as server, ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
        x = t.residual(1).save()
        y = nnsight.save(torch.eye(3) @ torch.eye(3))
        z = nnsight.save(torch.eye(3).double() @ torch.eye(3).double())
    assert (x.dtype, y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16, torch.float64)


def test_a_folder_without_a_model_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ModelError, match=r"(?s)the dry run cannot load .*ended with code 1\n.*config"):
        DryRunServer(tmp_path)


def test_a_process_that_dies_is_reported_and_so_is_one_that_was_closed(folder, weightless):
    server = DryRunServer(folder)
    os.kill(server._process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RemoteError, match="the server's process ended with code -9"):  # noqa: SIM117
            with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
                t.logits.save()
    server.close()
    server.close()
    with pytest.raises(RemoteError, match="the dry run is closed"):  # noqa: SIM117
        with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
            t.logits.save()


def test_the_last_words_of_a_process_that_dies_in_a_block_are_shown(folder, weightless):
    with DryRunServer(folder) as server, pytest.raises(RemoteError, match=r"(?s)ended with code 7\n.*out of luck"):  # noqa: SIM117
        with ATOTrace(weightless, input_ids=IDS, backend=server.backend(weightless)) as t:
            import sys

            t.logits.save()
            print("out of luck", flush=True)
            sys.stderr.flush()
            os._exit(7)
