"""Fine-tuning of diffusion policies by policy gradients (DPPO), beside the simple baselines in one core."""

import os

# Threads of torch that wait for each other sleep instead of spinning. OpenMP reads this once, when torch loads. On a
# machine that is busy otherwise, spinning takes the cores from the very threads that are waited for: there, an update
# on two cores was measured to take twice as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
