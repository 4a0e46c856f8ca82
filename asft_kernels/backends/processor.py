"""What plan.py asks of this machine's processor: one answer a process, so that results repeat."""

import torch

# By torch's own look at the processor, for whose products the chunks are chosen; "" where it does not know one.
INTEL = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
