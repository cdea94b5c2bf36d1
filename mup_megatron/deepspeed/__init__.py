"""μP under DeepSpeed: `import mup_megatron.deepspeed` before `deepspeed.initialize`, and a `"mup"` entry in its JSON.

Importing it only takes the places in DeepSpeed's engine; without the entry they pass everything on unchanged. DeepSpeed
itself is not imported here.
"""

from mup_megatron.deepspeed.hooks import install
from mup_megatron.deepspeed.names import param_groups
from mup_megatron.deepspeed.planning import plan_for
from mup_megatron.deepspeed.run import plan_of
from mup_megatron.modules.groups import Form

__all__ = ["Form", "param_groups", "plan_for", "plan_of"]

install()
