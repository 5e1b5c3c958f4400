"""DeepSpeed in fp16 on any CPU: it asks for fast kernels, but torch's slow ones will do for tests."""

import torch
from deepspeed.accelerator import get_accelerator


def allow_fp16():
    if not torch.cuda.is_available():
        accelerator = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
