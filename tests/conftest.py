import torch


# Tests run side by side (pytest -n), on maps too small to share: threads of one would wait for those of the others.
torch.set_num_threads(1)
