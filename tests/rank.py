"""One process of several: scores digits-like random images in all ways, and writes what it has.
Started by torchrun."""

import sys

import torch
from torch import distributed

from fisher_unlearn.scores.activation import activation_scores
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.scores.tfidf import tfidf_scores


def cases():
    "Batches whose number and last size fit no number of processes."
    torch.manual_seed(0)
    model = build_model("resnet20", 10, 1, seed=0)
    x, y = torch.randn(23, 1, 8, 8), torch.randint(10, (23,))
    return model, {
        size: list(zip(x.split(size), y.split(size))) for size in (5, 23)
    }  # 5 batches, the last of 3; 1 batch, so that a rank has none


def scores():
    model, loaders = cases()
    fisher = {
        (size, *e): diag_fisher(model, batches, *e, seed=3)
        for size, batches in loaders.items()
        for e in [
            ("true", "sample", "sum"),
            ("expected", "sample", "mean"),
            ("sampled", "sample", "mean"),
            ("expected", "batch", "mean"),
        ]
    }
    channels = {
        (size, "activation", per): activation_scores(model, batches, loaders[23][:1], per)
        for size, batches in loaders.items()
        for per in ("sample", "batch")
    }
    filters = {
        (size, "tfidf", number): tfidf_scores(
            model, batches, loaders[23][0][1][:2].tolist(), number
        )
        for size, batches in loaders.items()
        for number in (0, 1, 3)
    }
    return fisher | channels | filters


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.save(scores(), f"{sys.argv[1]}/{distributed.get_rank()}.pt")
    loader = torch.utils.data.DataLoader(
        list(zip(torch.randn(4, 1, 8, 8), torch.arange(4))),
        2,
        sampler=torch.utils.data.DistributedSampler(range(4)),
    )
    try:
        diag_fisher(cases()[0], loader)
    except ValueError as error:
        print(error)
    distributed.destroy_process_group()
