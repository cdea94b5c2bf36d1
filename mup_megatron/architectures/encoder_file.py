"""The model files of architectures whose layers are Megatron-Core's plain ones: `bert.py`, `t5.py`."""

from pydantic import model_validator

from mup_megatron.architectures.model_file import ModelFile

_ABSENT = ("num_experts", "multi_latent_attention", "mtp_num_layers", "qk_layernorm")


class EncoderFile(ModelFile):
    """A model file without the kinds of layers that only decoders have."""

    @model_validator(mode="after")
    def _plain_layers(self) -> "EncoderFile":
        for key in _ABSENT:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: Megatron's BERT and T5 have no such layers. Remove the key.")
        return self
