"""Models of many families, small and without memory, and what each of their parameters is."""

import re

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 4,
}
WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEEPSEEK = {
    **SMALL,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}


def built(model: str, config: str, **options):
    """A model of transformers on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def torch_layers():
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "layer": layer})


class Bottleneck(nn.Module):
    """A block of torchvision's ResNet, by its names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        )


class ResNet(nn.Module):
    """torchvision's ResNet, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Bottleneck(8), Bottleneck(8))
        self.fc = nn.Linear(8, 10)


class Attention(nn.Module):
    """timm's attention, by its names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)


class LayerScale(nn.Module):
    """timm's factor of a branch, by its name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    """timm's block of a vision transformer, by its names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), Attention(width), LayerScale(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)}
        )


class VisionTransformer(nn.Module):
    """timm's vision transformer, by its names."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4)})
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)


MODELS = {
    "llama": lambda: built("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": lambda: built("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": lambda: built("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    "gemma2": lambda: built("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8),
    "mistral": lambda: built("MistralForCausalLM", "MistralConfig", **GROUPED),
    "mixtral": lambda: built("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    "phi3": lambda: built("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0),
    "gpt_neox": lambda: built("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL),
    "falcon": lambda: built(
        "FalconForCausalLM", "FalconConfig", **SMALL, new_decoder_architecture=True, num_kv_heads=2
    ),
    "bloom": lambda: built(
        "BloomForCausalLM", "BloomConfig", vocab_size=96, hidden_size=32, n_layer=2, n_head=4
    ),
    "gpt2": lambda: built("GPT2LMHeadModel", "GPT2Config", **GPT),
    "bert": lambda: built("BertForMaskedLM", "BertConfig", **SMALL),
    "vit": lambda: built("ViTForImageClassification", "ViTConfig", **IMAGE),
    "t5": lambda: built(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    ),
    "torch": torch_layers,
    "conv": conv_net,
    "resnet": ResNet,
    "timm": VisionTransformer,
    # Those that an earlier classifier had not been fitted to.
    "opt": lambda: built(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
    ),
    "whisper": lambda: built("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
    "gptj": lambda: built("GPTJForCausalLM", "GPTJConfig", **GPT, rotary_dim=4),
    "distilbert": lambda: built(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=96,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
    ),
    "phi": lambda: built("PhiForCausalLM", "PhiConfig", **SMALL),
    "deepseek_v3": lambda: built("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK),
    "mamba": lambda: built(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
    ),
}

_LLAMA = """
    model.embed_tokens                             embedding
    model.layers.N.self_attn.q_proj                attention.q
    model.layers.N.self_attn.k_proj                attention.k
    model.layers.N.self_attn.v_proj                attention.v
    model.layers.N.self_attn.o_proj                attention.out
    model.layers.N.mlp.gate_proj                   mlp.gate
    model.layers.N.mlp.up_proj                     mlp.up
    model.layers.N.mlp.down_proj                   mlp.down
    model.layers.N.input_layernorm                 norm
    model.layers.N.post_attention_layernorm        norm
    model.norm                                     norm
"""
_HEAD = """
    lm_head                                        head
"""
_WHISPER_LAYER = """
    {}.self_attn.k_proj                            attention.k
    {}.self_attn.v_proj                            attention.v +
    {}.self_attn.q_proj                            attention.q +
    {}.self_attn.out_proj                          attention.out +
    {}.self_attn_layer_norm                        norm +
    {}.fc1                                         mlp.up +
    {}.fc2                                         mlp.down +
    {}.final_layer_norm                            norm +
"""
_T5_LAYER = """
    {0}.block.N.layer.N.SelfAttention.q              attention.q
    {0}.block.N.layer.N.SelfAttention.k              attention.k
    {0}.block.N.layer.N.SelfAttention.v              attention.v
    {0}.block.N.layer.N.SelfAttention.o              attention.out
    {0}.block.N.layer.N.SelfAttention.relative_attention_bias  position
    {0}.block.N.layer.N.layer_norm                   norm
    {0}.block.N.layer.N.DenseReluDense.wi_0          mlp.gate
    {0}.block.N.layer.N.DenseReluDense.wi_1          mlp.up
    {0}.block.N.layer.N.DenseReluDense.wo            mlp.down
    {0}.final_layer_norm                             norm
"""

EXPECTED = {
    "llama": _LLAMA + _HEAD,
    "qwen2": re.sub("attention.([qkv])\n", r"attention.\1 +\n", _LLAMA) + _HEAD,
    "qwen3": _LLAMA
    + _HEAD
    + """
    model.layers.N.self_attn.q_norm                norm
    model.layers.N.self_attn.k_norm                norm
""",
    "gemma2": _LLAMA
    + """
    model.layers.N.pre_feedforward_layernorm       norm
    model.layers.N.post_feedforward_layernorm      norm
""",
    "mistral": _LLAMA + _HEAD,
    "mixtral": """
    model.embed_tokens                             embedding
    model.layers.N.self_attn.q_proj                attention.q
    model.layers.N.self_attn.k_proj                attention.k
    model.layers.N.self_attn.v_proj                attention.v
    model.layers.N.self_attn.o_proj                attention.out
    model.layers.N.mlp.gate                        moe.router
    =model.layers.N.mlp.experts.gate_up_proj       moe.expert.gate_up
    =model.layers.N.mlp.experts.down_proj          moe.expert.down
    model.layers.N.input_layernorm                 norm
    model.layers.N.post_attention_layernorm        norm
    model.norm                                     norm
    lm_head                                        head
""",
    "phi3": """
    model.embed_tokens                             embedding
    model.layers.N.self_attn.qkv_proj              attention.qkv
    model.layers.N.self_attn.o_proj                attention.out
    model.layers.N.mlp.gate_up_proj                mlp.gate_up
    model.layers.N.mlp.down_proj                   mlp.down
    model.layers.N.input_layernorm                 norm
    model.layers.N.post_attention_layernorm        norm
    model.norm                                     norm
    lm_head                                        head
""",
    "gpt_neox": """
    gpt_neox.embed_in                              embedding
    gpt_neox.layers.N.input_layernorm              norm +
    gpt_neox.layers.N.post_attention_layernorm     norm +
    gpt_neox.layers.N.attention.query_key_value    attention.qkv +
    gpt_neox.layers.N.attention.dense              attention.out +
    gpt_neox.layers.N.mlp.dense_h_to_4h            mlp.up +
    gpt_neox.layers.N.mlp.dense_4h_to_h            mlp.down +
    gpt_neox.final_layer_norm                      norm +
    lm_head                                        head
""",
    "falcon": """
    transformer.word_embeddings                    embedding
    transformer.h.N.self_attention.query_key_value attention.qkv
    transformer.h.N.self_attention.dense           attention.out
    transformer.h.N.mlp.dense_h_to_4h              mlp.up
    transformer.h.N.mlp.dense_4h_to_h              mlp.down
    transformer.h.N.ln_attn                        norm +
    transformer.h.N.ln_mlp                         norm +
    transformer.ln_f                               norm +
""",
    "bloom": """
    transformer.word_embeddings                    embedding
    transformer.word_embeddings_layernorm          norm +
    transformer.h.N.input_layernorm                norm +
    transformer.h.N.self_attention.query_key_value attention.qkv +
    transformer.h.N.self_attention.dense           attention.out +
    transformer.h.N.post_attention_layernorm       norm +
    transformer.h.N.mlp.dense_h_to_4h              mlp.up +
    transformer.h.N.mlp.dense_4h_to_h              mlp.down +
    transformer.ln_f                               norm +
""",
    "gpt2": """
    transformer.wte                                embedding
    transformer.wpe                                position
    transformer.h.N.ln_1                           norm +
    transformer.h.N.attn.c_attn                    attention.qkv +
    transformer.h.N.attn.c_proj                    attention.out +
    transformer.h.N.ln_2                           norm +
    transformer.h.N.mlp.c_fc                       mlp.up +
    transformer.h.N.mlp.c_proj                     mlp.down +
    transformer.ln_f                               norm +
""",
    "bert": """
    bert.embeddings.word_embeddings                embedding
    bert.embeddings.position_embeddings            position
    bert.embeddings.token_type_embeddings          embedding
    bert.embeddings.LayerNorm                      norm +
    bert.encoder.layer.N.attention.self.query      attention.q +
    bert.encoder.layer.N.attention.self.key        attention.k +
    bert.encoder.layer.N.attention.self.value      attention.v +
    bert.encoder.layer.N.attention.output.dense    attention.out +
    bert.encoder.layer.N.attention.output.LayerNorm  norm +
    bert.encoder.layer.N.intermediate.dense        mlp.up +
    bert.encoder.layer.N.output.dense              mlp.down +
    bert.encoder.layer.N.output.LayerNorm          norm +
    =cls.predictions.bias                          bias:head
    cls.predictions.transform.dense                matrix +
    cls.predictions.transform.LayerNorm            norm +
""",
    "vit": """
    =vit.embeddings.cls_token                      position
    =vit.embeddings.position_embeddings            position
    vit.embeddings.patch_embeddings.projection     conv +
    vit.layers.N.attention.q_proj                  attention.q +
    vit.layers.N.attention.k_proj                  attention.k +
    vit.layers.N.attention.v_proj                  attention.v +
    vit.layers.N.attention.o_proj                  attention.out +
    vit.layers.N.layernorm_before                  norm +
    vit.layers.N.layernorm_after                   norm +
    vit.layers.N.mlp.fc1                           mlp.up +
    vit.layers.N.mlp.fc2                           mlp.down +
    vit.layernorm                                  norm +
    classifier                                     head +
""",
    "t5": """
    shared                                         embedding
    decoder.block.N.layer.N.EncDecAttention.q      attention.q
    decoder.block.N.layer.N.EncDecAttention.k      attention.k
    decoder.block.N.layer.N.EncDecAttention.v      attention.v
    decoder.block.N.layer.N.EncDecAttention.o      attention.out
"""
    + _T5_LAYER.format("encoder")
    + _T5_LAYER.format("decoder"),
    "torch": """
    =attention.in_proj_weight                      attention.qkv
    =attention.in_proj_bias                        bias:attention.qkv
    attention.out_proj                             attention.out +
    =layer.self_attn.in_proj_weight                attention.qkv
    =layer.self_attn.in_proj_bias                  bias:attention.qkv
    layer.self_attn.out_proj                       attention.out +
    layer.linear1                                  mlp.up +
    layer.linear2                                  mlp.down +
    layer.norm1                                    norm +
    layer.norm2                                    norm +
""",
    "conv": """
    =0.weight                                      conv
    =0.bias                                        bias:conv
    =1.weight                                      norm
    =1.bias                                        norm.bias
    =3.weight                                      head
    =3.bias                                        bias:head
""",
    "resnet": """
    conv1                                          conv
    bn1                                            norm +
    layer1.N.conv1                                 conv
    layer1.N.bn1                                   norm +
    layer1.N.conv2                                 conv
    layer1.N.bn2                                   norm +
    =layer1.N.downsample.0.weight                  conv
    =layer1.N.downsample.1.weight                  norm
    =layer1.N.downsample.1.bias                    norm.bias
    fc                                             head +
""",
    "timm": """
    =cls_token                                     position
    =pos_embed                                     position
    patch_embed.proj                               conv +
    blocks.N.norm1                                 norm +
    blocks.N.attn.qkv                              attention.qkv +
    blocks.N.attn.q_norm                           norm +
    blocks.N.attn.k_norm                           norm +
    blocks.N.attn.proj                             attention.out +
    =blocks.N.ls1.gamma                            vector
    blocks.N.norm2                                 norm +
    blocks.N.mlp.fc1                               mlp.up +
    blocks.N.mlp.fc2                               mlp.down +
    norm                                           norm +
    head                                           head +
""",
    "opt": """
    model.decoder.embed_tokens                     embedding
    model.decoder.embed_positions                  position
    model.decoder.project_in                       matrix
    model.decoder.project_out                      matrix
    model.decoder.final_layer_norm                 norm +
    model.decoder.layers.N.self_attn.k_proj        attention.k +
    model.decoder.layers.N.self_attn.v_proj        attention.v +
    model.decoder.layers.N.self_attn.q_proj        attention.q +
    model.decoder.layers.N.self_attn.out_proj      attention.out +
    model.decoder.layers.N.self_attn_layer_norm    norm +
    model.decoder.layers.N.fc1                     mlp.up +
    model.decoder.layers.N.fc2                     mlp.down +
    model.decoder.layers.N.final_layer_norm        norm +
""",
    "whisper": """
    model.encoder.conv1                            conv +
    model.encoder.conv2                            conv +
    model.encoder.embed_positions                  position
    model.encoder.layer_norm                       norm +
    model.decoder.embed_tokens                     embedding
    model.decoder.embed_positions                  position
    model.decoder.layer_norm                       norm +
    model.decoder.layers.N.encoder_attn.k_proj     attention.k
    model.decoder.layers.N.encoder_attn.v_proj     attention.v +
    model.decoder.layers.N.encoder_attn.q_proj     attention.q +
    model.decoder.layers.N.encoder_attn.out_proj   attention.out +
    model.decoder.layers.N.encoder_attn_layer_norm norm +
"""
    + _WHISPER_LAYER.replace("{}", "model.encoder.layers.N")
    + _WHISPER_LAYER.replace("{}", "model.decoder.layers.N"),
    "gptj": """
    transformer.wte                                embedding
    transformer.h.N.ln_1                           norm +
    transformer.h.N.attn.k_proj                    attention.k
    transformer.h.N.attn.v_proj                    attention.v
    transformer.h.N.attn.q_proj                    attention.q
    transformer.h.N.attn.out_proj                  attention.out
    transformer.h.N.mlp.fc_in                      mlp.up +
    transformer.h.N.mlp.fc_out                     mlp.down +
    transformer.ln_f                               norm +
    lm_head                                        head +
""",
    "distilbert": """
    distilbert.embeddings.word_embeddings          embedding
    distilbert.embeddings.position_embeddings      position
    distilbert.embeddings.LayerNorm                norm +
    distilbert.transformer.layer.N.attention.q_lin    attention.q +
    distilbert.transformer.layer.N.attention.k_lin    attention.k +
    distilbert.transformer.layer.N.attention.v_lin    attention.v +
    distilbert.transformer.layer.N.attention.out_lin  attention.out +
    distilbert.transformer.layer.N.sa_layer_norm      norm +
    distilbert.transformer.layer.N.ffn.lin1           mlp.up +
    distilbert.transformer.layer.N.ffn.lin2           mlp.down +
    distilbert.transformer.layer.N.output_layer_norm  norm +
    pre_classifier                                 matrix +
    classifier                                     head +
""",
    "phi": """
    model.embed_tokens                             embedding
    model.layers.N.self_attn.q_proj                attention.q +
    model.layers.N.self_attn.k_proj                attention.k +
    model.layers.N.self_attn.v_proj                attention.v +
    model.layers.N.self_attn.dense                 attention.out +
    model.layers.N.mlp.fc1                         mlp.up +
    model.layers.N.mlp.fc2                         mlp.down +
    model.layers.N.input_layernorm                 norm +
    model.final_layernorm                          norm +
    lm_head                                        head +
""",
    "deepseek_v3": """
    model.embed_tokens                             embedding
    model.layers.N.self_attn.q_a_proj              attention.q.a
    model.layers.N.self_attn.q_a_layernorm         norm
    model.layers.N.self_attn.q_b_proj              attention.q.b
    model.layers.N.self_attn.kv_a_proj_with_mqa    attention.kv.a
    model.layers.N.self_attn.kv_a_layernorm        norm
    model.layers.N.self_attn.kv_b_proj             attention.kv.b
    model.layers.N.self_attn.o_proj                attention.out
    model.layers.N.mlp.gate_proj                   mlp.gate
    model.layers.N.mlp.up_proj                     mlp.up
    model.layers.N.mlp.down_proj                   mlp.down
    model.layers.N.mlp.gate                        moe.router
    =model.layers.N.mlp.experts.gate_up_proj       moe.expert.gate_up
    =model.layers.N.mlp.experts.down_proj          moe.expert.down
    model.layers.N.mlp.shared_experts.gate_proj    mlp.gate
    model.layers.N.mlp.shared_experts.up_proj      mlp.up
    model.layers.N.mlp.shared_experts.down_proj    mlp.down
    model.layers.N.input_layernorm                 norm
    model.layers.N.post_attention_layernorm        norm
    model.norm                                     norm
    lm_head                                        head
""",
    "mamba": """
    backbone.embeddings                            embedding
    backbone.layers.N.norm                         norm
    =backbone.layers.N.mixer.A_log                 ssm.a
    =backbone.layers.N.mixer.D                     ssm.d
    backbone.layers.N.mixer.conv1d                 conv +
    backbone.layers.N.mixer.in_proj                ssm.in
    backbone.layers.N.mixer.x_proj                 ssm.x
    backbone.layers.N.mixer.dt_proj                ssm.dt +
    backbone.layers.N.mixer.out_proj               ssm.out
    backbone.norm_f                                norm
""",
}
"""By hand. A line is an owner and the role of its weight, `+` where it has a bias, or `=` and a
parameter; N is any number."""


def expected(family: str) -> dict[str, str]:
    """Role by name, with N for a number; of a bias with what it belongs to, behind a colon."""
    table: dict[str, str] = {}
    for line in filter(str.strip, EXPECTED[family].splitlines()):
        name, role, *bias = line.split()
        if name.startswith("="):
            table[name[1:]] = role
            continue
        table[f"{name}.weight"] = role
        if bias:
            table[f"{name}.bias"] = "norm.bias" if role == "norm" else f"bias:{role}"
    return table
