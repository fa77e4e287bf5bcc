"""What only a GPU can show: ``./test.sh --gpu``. Skipped without one; the other tests do not see it."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
