"""A plugin that gives vLLM the int8 and FP4 of eff-quant."""


def register() -> None:
    """Make the methods known to vLLM; called by it in each of its processes, and harmless when called again."""
    from eff_vllm.quantization import EffFP4, EffInt8, register_quantization_config

    register_quantization_config("eff_int8")(EffInt8)
    register_quantization_config("eff_fp4")(EffFP4)


__all__ = ["register"]
