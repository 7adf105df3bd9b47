"""What synthetic pictures are compared with: labels, and real pictures sent to a teacher. Not the agent's way.

Shape letters: N pictures, C channels, H and W height and width, K classes.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks import datasets
from benchmarks.services import ServiceError, account_key, serving, show_account
from edge_agent import augment
from edge_agent.distill import Pool
from edge_agent.pixels import normalise, quantise
from networks.modelfile import load_model

VIEWS = 5
SHIFT_PX = {1: 2, 3: 4}
"""Largest shift of a view, by channels: what grey digits and small photographs bear."""
BATCH_PICTURES = 100


def labels(dataset: str, root: Path, pictures: str) -> Pool:
    """Labelled training pictures as a pool of right answers: the device's part, or all of them."""
    if pictures not in ("device", "all"):
        raise ValueError(f"pictures: expected device or all, got {pictures!r}")
    names: tuple[Any, ...] = ("device",) if pictures == "device" else ("device", "development", "cloud")
    parts = [datasets.part(dataset, root, name) for name in names]
    images_NCHW = torch.from_numpy(np.concatenate([part.images_NCHW for part in parts]))
    labels_N = torch.from_numpy(np.concatenate([part.labels_N for part in parts]))
    return Pool(images_NCHW=images_NCHW, latents_NL=_none(len(labels_N)), class_indices_N=labels_N)


def views(
    images_NCHW: npt.NDArray[np.uint8], *, teacher: Path, budget: int, mirror: bool, seed: int, folder: Path
) -> tuple[Pool, dict[str, int]]:
    """The local pictures themselves, VIEWS kept views of each, asked about once with a stock client.

    This uploads private pictures: it is the ceiling that shows what privacy costs. Returns the pool and the queries
    that the ledger has charged; asked again after an interruption, what was paid for is answered without a charge.
    """
    rng = torch.Generator().manual_seed(seed)
    asked_NCHW = torch.cat([_view(torch.from_numpy(images_NCHW), mirror=mirror, rng=rng) for _ in range(VIEWS)])
    if len(asked_NCHW) > budget:
        raise ValueError(f"budget: expected at least {len(asked_NCHW)}, got {budget}")
    about = hashlib.sha256(asked_NCHW.numpy().tobytes() + load_model(teacher).digest.encode()).hexdigest()[:16]
    kept = folder / f"answers-{about}.npy"
    ledger = f"sqlite:///{folder / 'ledger.db'}"
    if not kept.is_file():
        key = account_key(ledger, "benchmark", budget, folder / "key")
        with serving(teacher, ledger, log=folder / "teacher-serve.log") as address:
            answers_NK = _ask(address, key, asked_NCHW.numpy(), name=f"views-{about}")
        beside = kept.with_name(f".{kept.name}")
        np.save(beside, answers_NK)
        beside.rename(kept)
    posted = show_account(ledger, "benchmark")["posted"]
    if posted != len(asked_NCHW):
        raise ServiceError(f"expected the ledger to have posted {len(asked_NCHW)}, got {posted}")
    answers_NK = np.load(kept, allow_pickle=False)
    pool = Pool(
        images_NCHW=asked_NCHW,
        latents_NL=_none(len(asked_NCHW)),
        probabilities_NK=torch.from_numpy(answers_NK),
    )
    return pool, {"charged": posted}


def _ask(address: str, key: str, images_NCHW: npt.NDArray[np.uint8], *, name: str) -> npt.NDArray[np.float32]:
    from tritonclient import grpc as triton

    client = triton.InferenceServerClient(address)
    try:
        model = client.get_model_repository_index(headers={"authorization": f"Bearer {key}"}).models[0].name
        answers = []
        for start in range(0, len(images_NCHW), BATCH_PICTURES):
            batch_NCHW = images_NCHW[start : start + BATCH_PICTURES]
            tensor = triton.InferInput("images", list(batch_NCHW.shape), "UINT8")
            tensor.set_data_from_numpy(batch_NCHW)
            answered = client.infer(
                model,
                [tensor],
                parameters={"idempotency_key": f"{name}-{start}"},
                headers={"authorization": f"Bearer {key}"},
                client_timeout=60.0,
            )
            answers.append(answered.as_numpy("probabilities"))
    finally:
        client.close()
    return np.concatenate(answers).astype(np.float32)


def _view(images_NCHW: Tensor, *, mirror: bool, rng: torch.Generator) -> Tensor:
    view_NCHW = normalise(images_NCHW)
    if mirror:
        view_NCHW = augment.mirror(view_NCHW, rng=rng)
    return quantise(augment.shift(view_NCHW, largest_px=SHIFT_PX[images_NCHW.shape[1]], rng=rng, reflect=True))


def _none(count: int) -> Tensor:
    return torch.empty(count, 0)
