"""A model actor for machines without a GPU: trusted requests run in its process, others in a sandbox, as ndif's own actor decides.

Named to the server by NDIF_MODEL_IMPORT_PATH, an official setting; nothing of the ndif package is patched.
"""

import gc

import ray
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


class CPUModelDeployment(SandboxModelDeployment):
    CACHEABLE = False  # parking moves weights between GPU and CPU

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs)
        model._module.requires_grad_(False)
        return model

    def cleanup(self):  # ndif's own, less the calls to CUDA
        self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUModelActor(CPUModelDeployment):
    pass
