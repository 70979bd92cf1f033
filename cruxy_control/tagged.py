"""The rates of the original Tiger: by what a parameter is, and by slice of fused q, k and v."""

RATES = {
    "lora": 0.8,
    "lora.scale": 0.5,
    "mlp.up": 1.1,
    "mlp.down": 0.9,
    "position": 0.5,
    "bias": 0.5,
    "embedding": 0.5,
    "norm": 0.5,
    "attention.q": 0.9,
    "attention.k": 0.8,
    "attention.v": 1.1,
}
"""What Tiger multiplies the rate by, by role; 1 where there is none."""

SLICE_RATES = {"q": 0.9, "k": 0.8, "v": 1.1}
"""What it multiplies the rates of q, k and v by in a tensor that holds all three."""
