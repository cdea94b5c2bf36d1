"""The keys of multi-token prediction (MTP)."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from mup_megatron.architectures.flag import Flag, number, whole_number
from mup_megatron.architectures.keys.unread import only_with
from mup_megatron.validation import Strict, added


class MtpKeys(Strict):
    """Further layers that each predict the token after the next (DeepSeek-V3, arXiv 2412.19437, §2.2)."""

    mtp_num_layers: Annotated[int, Field(gt=0, le=10**4)] | None = added("0.2", None)
    mtp_loss_scaling_factor: Annotated[float, Field(ge=0)] = added("0.2", 0.1)


FLAGS: Mapping[str, Flag] = {
    "mtp_num_layers": Flag("--mtp-num-layers", "mtp_num_layers", None, whole_number),
    "mtp_loss_scaling_factor": Flag("--mtp-loss-scaling-factor", "mtp_loss_scaling_factor", 0.1, number),
}
UNREAD = (only_with("mtp_num_layers", "mtp_loss_scaling_factor"),)
