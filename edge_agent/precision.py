"""How exactly a network computes while it trains, or draws in many passes."""

import torch


def training_precision(device: torch.device) -> torch.autocast:
    """Return a context for forward passes in `training_dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training_dtype(device) is torch.bfloat16)


def training_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the processor is built for it, else float32.

    On a CPU that means matrix units (AMX), or instructions for vectors of it (AVX512-BF16) unless they are Intel's:
    elsewhere bfloat16 is emulated, many times slower than float32. With those vectors alone, one core of an EPYC took
    for a step of ResNet8 65 %, of ResNet20 71 %, of a GAN's generator 43 % and of diffusion 63 % of the time that
    float32 took; one of a Xeon whose AMX is hidden took 120 % for ResNet8, 130 % for ResNet20, 120 % for MobileNet
    and 145 % for a GAN's generator.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older releases of torch cannot say; float32 is right everywhere.
        get_capabilities = getattr(torch.cpu, "get_capabilities", None)
        able = get_capabilities() if get_capabilities is not None else {}
        of_intel = str(able.get("cpu_name", "")).startswith("Intel")
        fast = bool(able.get("amx_bf16") or (able.get("avx512_bf16") and not of_intel))
    return torch.bfloat16 if fast else torch.float32
