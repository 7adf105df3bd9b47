"""Images on the wire, both directions side by side. Costs numpy, not torch.

Shape letters: N pictures, C channels, H height, W width, K classes.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from protos.errors import Reason, Refusal
from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_RAW_UINT8,
    Answer,
    ClassIndices,
    ImageBatch,
    ImageEncoding,
    Probabilities,
)

ENCODINGS = (IMAGE_ENCODING_RAW_UINT8,)

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


def encode_images(images_NCHW: UInt8Array) -> ImageBatch:
    """uint8 pictures (N, C, H, W) as a message. Raises ValueError for another type or rank."""
    if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4:
        raise ValueError(f"expected uint8 (N, C, H, W), got {images_NCHW.dtype} {images_NCHW.shape}")
    count, channels, height, width = images_NCHW.shape
    return ImageBatch(
        encoding=IMAGE_ENCODING_RAW_UINT8,
        picture_count=count,
        channels=channels,
        height=height,
        width=width,
        payload=np.ascontiguousarray(images_NCHW).tobytes(),
    )


def check_images(batch: ImageBatch, *, channels: int, height: int, width: int, max_batch_pictures: int) -> None:
    """Refuses (INVALID_IMAGES) what ``decode_images`` could not turn into pictures of the described size.

    Looks at the header and the payload's length alone, so it may run before anything is reserved.
    """

    def expect(field: str, expected: object, got: object) -> None:
        if expected != got:
            raise Refusal.of(Reason.INVALID_IMAGES, field=f"batch.images.{field}", expected=expected, got=got)

    if batch.encoding not in ENCODINGS:
        known = ", ".join(ImageEncoding.Name(encoding) for encoding in ENCODINGS)
        raise Refusal.of(Reason.INVALID_IMAGES, field="batch.images.encoding", expected=known, got=batch.encoding)
    if not 1 <= batch.picture_count <= max_batch_pictures:
        raise Refusal.of(
            Reason.INVALID_IMAGES,
            field="batch.images.picture_count",
            expected=f"1 to {max_batch_pictures}",
            got=batch.picture_count,
        )
    expect("channels", channels, batch.channels)
    expect("height", height, batch.height)
    expect("width", width, batch.width)
    expected_bytes = batch.picture_count * channels * height * width
    expect("payload", f"{expected_bytes} bytes", f"{len(batch.payload)} bytes")


def fits_its_header(batch: ImageBatch) -> bool:
    """Whether header and payload agree with each other, whatever a server accepts just now."""
    sizes = (batch.picture_count, batch.channels, batch.height, batch.width)
    return batch.encoding in ENCODINGS and min(sizes) > 0 and math.prod(sizes) == len(batch.payload)


def decode_images(batch: ImageBatch) -> UInt8Array:
    """The pictures of a checked message, uint8 (N, C, H, W), read-only."""
    shape = (batch.picture_count, batch.channels, batch.height, batch.width)
    return np.frombuffer(batch.payload, dtype=np.uint8).reshape(shape)


def request_digest(batch: ImageBatch) -> bytes:
    """SHA-256 over encoding, shape and payload as received: what ties a batch id to its pictures."""
    header = f"{batch.encoding},{batch.picture_count},{batch.channels},{batch.height},{batch.width};"
    digest = hashlib.sha256(header.encode())
    digest.update(batch.payload)
    return digest.digest()


def pixel_digest(images_NCHW: UInt8Array) -> bytes:
    """SHA-256 over decoded pixels, row-major: teacher and agent compare what was really looked at."""
    return hashlib.sha256(np.ascontiguousarray(images_NCHW).data).digest()


def encode_probabilities(probabilities_NK: Float32Array) -> Probabilities:
    """float32 probabilities (N, K) as a message."""
    values = np.ascontiguousarray(probabilities_NK, dtype="<f4")
    return Probabilities(class_count=values.shape[1], values=values.tobytes())


def encode_class_indices(indices_N: Int64Array, class_count: int) -> ClassIndices:
    """Class indices (N,) as a message."""
    return ClassIndices(class_count=class_count, values=indices_N.tolist())


def decode_answer(answer: Answer, *, picture_count: int, class_count: int) -> Float32Array | Int64Array:
    """Probabilities (N, K) as float32, or class indices (N,) as int64, whichever the answer holds.

    Raises ValueError when the answer is neither, of another size, or not numbers of that kind.
    """
    kind = answer.WhichOneof("outcome")
    if kind == "probabilities":
        values = np.frombuffer(answer.probabilities.values, dtype="<f4")
        if answer.probabilities.class_count != class_count or values.size != picture_count * class_count:
            raise ValueError(
                f"expected {picture_count} x {class_count} probabilities, got {values.size} values "
                f"for {answer.probabilities.class_count} classes"
            )
        probabilities_NK = values.reshape(picture_count, class_count).astype(np.float32)
        if not (np.isfinite(probabilities_NK).all() and (probabilities_NK >= 0).all()):
            raise ValueError("expected finite probabilities of at least 0, got others")
        if np.abs(probabilities_NK.sum(axis=1) - 1.0).max() > 1e-2:
            raise ValueError("expected probabilities that sum to 1 for each picture, got others")
        return probabilities_NK
    if kind == "class_indices":
        indices_N = np.array(answer.class_indices.values, dtype=np.int64)
        if answer.class_indices.class_count != class_count or indices_N.shape != (picture_count,):
            raise ValueError(
                f"expected {picture_count} indices of {class_count} classes, got {indices_N.size} "
                f"of {answer.class_indices.class_count}"
            )
        if ((indices_N < 0) | (indices_N >= class_count)).any():
            raise ValueError(f"expected class indices from 0 to {class_count - 1}, got others")
        return indices_N
    raise ValueError(f"expected probabilities or class indices, got {kind or 'an unknown kind of answer'}")
