"""Find the added explainer; of a linear model it gives the Shapley values."""

import torch

from perdure.explain import KernelSHAP, LeaveOneOut, find, names

assert "leave_one_out" in names() and find("leave_one_out") is LeaveOneOut
weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
rows = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
mine, shapley = (
    explainer.explain(lambda x: x @ weights, rows, torch.zeros(1, 3)).values.double()
    for explainer in (LeaveOneOut(), KernelSHAP())
)
torch.testing.assert_close(mine, shapley, atol=1e-5, rtol=0)
