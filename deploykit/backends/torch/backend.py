"""torch: the module itself, eager."""

from deploykit.backends.backend import Backend
from deploykit.optional import PACKAGES

BACKEND = Backend(
    name="torch",
    package=PACKAGES["torch"],
    precisions=("fp32", "fp16", "bf16"),
    source="torch",
    devices="deploykit.backends.torch.adapter:torch_devices",
    place="deploykit.backends.torch.adapter:place",
)
