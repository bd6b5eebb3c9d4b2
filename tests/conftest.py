"""One torch thread: the models are small, and threads that wait for each other slow a busy machine down tenfold."""

import torch

torch.set_num_threads(1)

collect_ignore = ["second_device.py"]  # changes torch for the whole process that imports it, as doctests would
