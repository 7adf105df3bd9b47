"""How exactly a network computes while it trains, or draws in many passes."""

import torch


def training_precision(device: torch.device) -> torch.autocast:
    """Return a context for forward passes: bfloat16 where the processor is built for it, else float32.

    On a CPU that means matrix units (AMX): elsewhere bfloat16 is emulated, many times slower than float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older releases of torch cannot say; float32 is right everywhere.
        get_capabilities = getattr(torch.cpu, "get_capabilities", None)
        fast = get_capabilities is not None and bool(get_capabilities().get("amx_bf16", False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
