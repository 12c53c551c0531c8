"""A sovit encoder as a model of transformers, for the shapes that none of its own classes can express.

    import sovit.encoder.hf_model                           # registers the two classes with transformers' Auto classes
    encoder = transformers.AutoModel.from_pretrained(FOLDER)  # a folder of `sovit export --format sovit`

No code stands in the folder and none is trusted: who loads it has sovit installed.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sovit.encoder.model import build
from sovit.spec.shape import Shape


class SovitVisionConfig(PreTrainedConfig):
    """The fields of a Shape in transformers' words. `pool`: avg, map, token or none."""

    model_type = "sovit_vision"
    base_config_key = "vision_config"

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    pool: str = "avg"
    num_registers: int = 0
    qkv_bias: bool = True
    layer_scale: bool = False
    initializer_range: float = 0.02  # of what transformers draws anew

    @property
    def shape(self) -> Shape:
        """Raises UserError for one that cannot be built."""
        return Shape(
            width=self.hidden_size,
            depth=self.num_hidden_layers,
            mlp_dim=self.intermediate_size,
            head_dim=self.hidden_size // self.num_attention_heads,
            patch_size=self.patch_size,
            image_size=self.image_size,
            pool=self.pool,  # type: ignore[arg-type]  # Shape checks it
            num_registers=self.num_registers,
            qkv_bias=self.qkv_bias,
            layer_scale=self.layer_scale,
        )


class SovitVisionModel(PreTrainedModel):
    """images [B, 3, S, S] -> patch tokens [B, N, D] in raster order, and one vector an image [B, D].

    pooler_output is MAP head, normed mean, class token, or the mean of the normed tokens where nothing is pooled;
    hidden_states stand before the blocks and behind each, un-normed. Class token and registers are left out: Llava, which
    takes "full" features, gets the N patches of an image and no more.
    """

    config_class = SovitVisionConfig
    config: SovitVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as in transformers' own vision models
    _no_split_modules = ["Block"]
    _supports_sdpa = True  # timm's own choice of kernel

    def __init__(self, config: SovitVisionConfig):
        super().__init__(config)
        self.trunk: Any = build(config.shape)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint lacks: transformers leaves parameters of no known module as memory had them."""
        super()._init_weights(module)
        std = self.config.initializer_range
        for name in ("pos_embed", "cls_token", "reg_token", "latent"):
            if isinstance(drawn := getattr(module, name, None), nn.Parameter):
                initialization.normal_(drawn, std=std)
        if isinstance(module, LayerScale):
            initialization.constant_(module.gamma, 1e-5)

    @property
    def norm(self) -> nn.Module:
        """The final norm; a mean-pooled timm ViT has it behind the mean."""
        return self.trunk.fc_norm if isinstance(self.trunk.norm, nn.Identity) else self.trunk.norm

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """`output_hidden_states` may be the number of a layer, 0 too, as Llava asks for it; all are returned then."""
        trunk = self.trunk
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states is not False
        x = trunk.patch_embed(pixel_values.to(trunk.patch_embed.proj.weight.dtype))  # [B, N, D]
        x = trunk.norm_pre(trunk._pos_embed(x))  # [B, prefix + N, D]
        states = [x]
        for block in trunk.blocks:
            x = block(x)
            states.append(x)
        prefix = trunk.num_prefix_tokens
        patches = self.norm(x[:, prefix:])
        pooled = patches.mean(1) if self.config.pool == "none" else trunk.forward_head(trunk.norm(x), pre_logits=True)
        output = BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=pooled,
            hidden_states=tuple(state[:, prefix:] for state in states) if asked else None,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


AutoConfig.register(SovitVisionConfig.model_type, SovitVisionConfig, exist_ok=True)
AutoModel.register(SovitVisionConfig, SovitVisionModel, exist_ok=True)
