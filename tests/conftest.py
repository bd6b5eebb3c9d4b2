"""One torch thread: the models are small, and threads that wait for each other slow a busy machine down tenfold."""

import torch

torch.set_num_threads(1)

# The first changes torch for the whole process that imports it, as doctests would; the second needs an old version.
collect_ignore = ["second_device.py", "storage/old_files/make.py"]
