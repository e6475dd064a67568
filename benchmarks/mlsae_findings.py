"""What a multi-layer SAE says about a model: reconstruction and its cost by layer, the variance of the layer, and transport.

Run after training one, for example:

    nnato mlsae train --expansion 8 --tokens 60000 --rows 1024 --lr 1e-3 --out mlsae/
    python benchmarks/mlsae_findings.py gemma-3-270m mlsae/ results.json
"""

import json
import sys

from nnato.accumulation import accumulate_cached, tokenize
from nnato.cli.common import finite, progress_bar
from nnato.corpus import Corpus
from nnato.fidelity import fidelity
from nnato.fitting import fit
from nnato.latent_transport import latent_transport
from nnato.layer_stats import WEIGHTS, layer_distributions, layer_variance_intervals
from nnato.models import describe, load_model
from nnato.multilayer import layer_activity, load_multilayer
from nnato.similarity import layer_cosines, max_cosines

name, folder, out = sys.argv[1:4]
with progress_bar() as progress:
    model = load_model(name)
    info = describe(model)
    sae = load_multilayer(folder, info)
    blocks = tokenize(model, Corpus(tokens=100_000), progress)
    activity = layer_activity(model, sae, blocks, out=folder, progress=progress)
    record = {"model": activity.model, "text": activity.text, "sae": activity.sae, "tokens": activity.stats.tokens}
    record["metrics"] = [{**row, "fvu": row["fvu"].to_json()} for row in activity.metrics()]
    record["variance"] = {
        weights: {key: interval.to_json() for key, interval in layer_variance_intervals(activity.folds, weights).items()}
        for weights in WEIGHTS
    }
    distributions = layer_distributions(activity.stats)
    record["latents"] = {key: float(values.nanmean()) for key, values in distributions.items()}
    record["dead"] = float((distributions["tokens"] == 0).double().mean())
    spread = activity.stats.spread.sum(0)[1:]
    record["layers_at_a_token"] = (spread / spread.sum()).tolist()
    record["mmcs"] = float(max_cosines(sae.dictionary.W_dec).nanmean())
    record["cosines"] = [one.mean.to_json() for one in layer_cosines(model, sae.sites, blocks, progress=progress)]
    pairs = list(zip(sae.sites[:-1], sae.sites[1:], strict=True))
    moments = accumulate_cached(model, Corpus(tokens=80 * info.d_model), pairs, progress=progress)
    fits = fit(moments, pairs, progress=progress)
    transport = latent_transport(model, sae, [one.operator for one in fits], blocks, progress=progress)
    record["transport"] = [{**transport.coincidence(pair).to_json(), "residual_r2": one.r2} for pair, one in zip(pairs, fits, strict=True)]
    record["fidelity"] = [one.to_json() for one in fidelity(model, sae, blocks, sequences=6, progress=progress)]
with open(out, "w") as file:
    json.dump(finite(record), file, indent=1)
