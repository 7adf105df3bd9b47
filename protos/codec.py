"""Images and answers on the wire, both directions side by side. Costs numpy, not torch.

Shape letters: N pictures, C channels, H height, W width, K classes, J classes named for each picture.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos import mosaic
from protos.errors import Reason, Refusal
from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_PNG_MOSAIC,
    IMAGE_ENCODING_RAW_UINT8,
    Answer,
    ClassIndices,
    ImageBatch,
    ImageEncoding,
    Probabilities,
    TopK,
)

ENCODINGS = (IMAGE_ENCODING_RAW_UINT8, *mosaic.ENCODINGS)
LOSSLESS = (IMAGE_ENCODING_RAW_UINT8, IMAGE_ENCODING_PNG_MOSAIC)
PICTURE_COUNT_FIELD = "batch.images.picture_count"  # in refusals
MOST_DECIMALS = 7  # what a 32-bit float holds of a probability
# How far a model's own probabilities may sum to something else than 1: computed in half precision, they do.
SUM_TOLERANCE = 1e-2

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReceivedImages:
    """Pictures as they were sent, outside of a message: there, every look at the payload is a copy of it."""

    encoding: int
    picture_count: int
    channels: int
    height: int
    width: int
    payload: bytes

    @classmethod
    def of(cls, batch: ImageBatch) -> "ReceivedImages":
        """What a message holds, checked or not."""
        return cls(batch.encoding, batch.picture_count, batch.channels, batch.height, batch.width, batch.payload)


def encode_images(
    images_NCHW: UInt8Array, encoding: int = IMAGE_ENCODING_RAW_UINT8, *, quality: int = 95
) -> ImageBatch:
    """uint8 pictures (N, C, H, W) as a message; ``quality`` 1 to 100, of the lossy encodings.

    Raises ValueError for another type or rank, and for pictures that the encoding does not hold (``mosaic.encode``).
    """
    if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4:
        raise ValueError(f"expected uint8 (N, C, H, W), got {images_NCHW.dtype} {images_NCHW.shape}")
    count, channels, height, width = images_NCHW.shape
    if encoding == IMAGE_ENCODING_RAW_UINT8:
        payload = np.ascontiguousarray(images_NCHW).tobytes()
    else:
        payload = mosaic.encode(images_NCHW, encoding, quality)
    return ImageBatch(
        encoding=ImageEncoding.Name(encoding),
        picture_count=count,
        channels=channels,
        height=height,
        width=width,
        payload=payload,
    )


def check_images(
    batch: ImageBatch | ReceivedImages, *, channels: int, height: int, width: int, max_batch_pictures: int
) -> None:
    """Refuses (INVALID_IMAGES) what ``decode_images`` could not turn into pictures of the described size.

    Decompresses nothing, so it may run before anything is reserved. Of a mosaic that leaves open whether its pixels
    decode; how many they are is known.
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
            field=PICTURE_COUNT_FIELD,
            expected=f"1 to {max_batch_pictures}",
            got=batch.picture_count,
        )
    expect("channels", channels, batch.channels)
    expect("height", height, batch.height)
    expect("width", width, batch.width)
    sizes = _sizes(batch)
    raw_bytes = batch.picture_count * channels * height * width
    if batch.encoding == IMAGE_ENCODING_RAW_UINT8:
        expect("payload", f"{raw_bytes} bytes", f"{len(batch.payload)} bytes")
        return
    if len(batch.payload) > raw_bytes + mosaic.MARGIN_BYTES:
        expect("payload", f"at most {raw_bytes + mosaic.MARGIN_BYTES} bytes", f"{len(batch.payload)} bytes")
    try:
        mosaic.check(batch.payload, batch.encoding, **sizes)
    except ValueError as error:
        expect("payload", mosaic.expected(batch.encoding, **sizes), error)


def fits_its_header(batch: ImageBatch | ReceivedImages) -> bool:
    """Whether header and payload agree with each other, whatever a server accepts just now."""
    if min(_sizes(batch).values()) <= 0:
        return False
    try:
        check_images(
            batch,
            channels=batch.channels,
            height=batch.height,
            width=batch.width,
            max_batch_pictures=batch.picture_count,
        )
    except Refusal:
        return False
    return True


def decode_images(batch: ImageBatch | ReceivedImages) -> UInt8Array:
    """The pictures of a checked message, uint8 (N, C, H, W), read-only.

    Refuses (INVALID_IMAGES) a mosaic whose pixels do not decode.
    """
    sizes = _sizes(batch)
    if batch.encoding == IMAGE_ENCODING_RAW_UINT8:
        return np.frombuffer(batch.payload, dtype=np.uint8).reshape(tuple(sizes.values()))
    try:
        return mosaic.decode(batch.payload, batch.encoding, **sizes)
    except ValueError as error:
        expected = mosaic.expected(batch.encoding, **sizes)
        raise Refusal.of(Reason.INVALID_IMAGES, field="batch.images.payload", expected=expected, got=error) from None


def _sizes(batch: ImageBatch | ReceivedImages) -> dict[str, int]:
    """N, C, H and W by name, in this order."""
    names = ("picture_count", "channels", "height", "width")
    return {name: getattr(batch, name) for name in names}


def payload_digest(batch: ImageBatch | ReceivedImages) -> bytes:
    """SHA-256 over the payload as received; of raw pictures it is their ``pixel_digest``."""
    return hashlib.sha256(batch.payload).digest()


def request_digest(batch: ImageBatch | ReceivedImages, payload_digest: bytes) -> bytes:
    """SHA-256 over encoding, shape and the payload's digest: what ties a batch id to its pictures.

    Over the digest and not over the payload, so that the pixels of a batch are hashed once and not twice.
    """
    header = f"{batch.encoding},{batch.picture_count},{batch.channels},{batch.height},{batch.width};"
    return hashlib.sha256(header.encode() + payload_digest).digest()


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


def encode_top_k(indices_NJ: Int64Array, values_NJ: Float32Array, class_count: int) -> TopK:
    """The most probable classes and their float32 probabilities (N, J), both in falling order, as a message."""
    values = np.ascontiguousarray(values_NJ, dtype="<f4")
    return TopK(
        class_count=class_count,
        named_count=values.shape[1],
        indices=indices_NJ.ravel().tolist(),
        values=values.tobytes(),
    )


def rounding_error(decimals: int | None) -> float:
    """The most that rounding to so many decimals moves a probability: half of 10^-decimals; 0 where it is None."""
    return 0.0 if decimals is None else 0.5 * 10.0**-decimals


def decimals_of(answer: Answer) -> int | None:
    """To how many decimals an answer's probabilities were rounded; None where they were not.

    Raises ValueError for a number of decimals that there is not.
    """
    if not answer.HasField("decimals"):
        return None
    if not 1 <= answer.decimals <= MOST_DECIMALS:
        raise ValueError(f"expected probabilities of 1 to {MOST_DECIMALS} decimals, got {answer.decimals}")
    return int(answer.decimals)


def kind_of(answer: Answer) -> str:
    """What kind of answer it is, for people: soft, hard or top-3; rounded ones with ", 2 decimals"."""
    kind = answer.WhichOneof("outcome")
    names = {"probabilities": "soft", "class_indices": "hard", "top_k": f"top-{answer.top_k.named_count}"}
    rounding = ""
    if answer.HasField("decimals") and kind != "class_indices":
        rounding = f", {answer.decimals} decimal{'s' if answer.decimals != 1 else ''}"
    return names.get(kind or "", "unknown") + rounding


def decode_answer(answer: Answer, *, picture_count: int, class_count: int) -> Float32Array | Int64Array:
    """Probabilities (N, K) as float32, or class indices (N,) as int64, whichever the answer holds.

    Probabilities that were sold whole come as they are, bit for bit. What a policy took away is put back as evenly as
    what is left allows: of top-k answers the missing mass is spread over the other classes, each at most as probable
    as the last one named; of rounded ones the sum becomes 1 again and no value moves by more than its rounding did.

    Raises ValueError when the answer is neither, of another size, not numbers of that kind, or of a sum that neither
    rounding nor the classes left out explain.
    """
    kind = answer.WhichOneof("outcome")
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
    decimals = decimals_of(answer)
    if kind == "probabilities":
        sold_NK = _decode_probabilities(answer.probabilities, picture_count, class_count)
        whole_NK, _ = _completed(sold_NK, class_count, decimals)
        return sold_NK if decimals is None else whole_NK.astype(np.float32)
    if kind == "top_k":
        indices_NJ, sold_NJ = _decode_top_k(answer.top_k, picture_count, class_count)
        named_NJ, other_N1 = _completed(sold_NJ, class_count, decimals)
        spread_NK = np.repeat(other_N1, class_count, axis=1)
        np.put_along_axis(spread_NK, indices_NJ, named_NJ, axis=1)
        return spread_NK.astype(np.float32)
    raise ValueError(f"expected probabilities, top-k or class indices, got {kind or 'an unknown kind of answer'}")


def sold_probabilities(answer: Answer, *, picture_count: int, class_count: int) -> Float32Array:
    """Probabilities (N, K) as float32, exactly as sold: of top-k answers zero for every class that is not named.

    Raises ValueError when the answer holds none, is of another size, or not numbers of that kind.
    """
    kind = answer.WhichOneof("outcome")
    if kind == "probabilities":
        return _decode_probabilities(answer.probabilities, picture_count, class_count)
    if kind == "top_k":
        indices_NJ, sold_NJ = _decode_top_k(answer.top_k, picture_count, class_count)
        probabilities_NK = np.zeros((picture_count, class_count), dtype=np.float32)
        np.put_along_axis(probabilities_NK, indices_NJ, sold_NJ, axis=1)
        return probabilities_NK
    raise ValueError(f"expected probabilities or top-k, got {kind or 'an unknown kind of answer'}")


def _decode_probabilities(message: Probabilities, picture_count: int, class_count: int) -> Float32Array:
    values = _float32s(message.values)
    if message.class_count != class_count or values.size != picture_count * class_count:
        raise ValueError(
            f"expected {picture_count} x {class_count} probabilities, got {values.size} values "
            f"for {message.class_count} classes"
        )
    return _checked_values(values.reshape(picture_count, class_count))


def _decode_top_k(message: TopK, picture_count: int, class_count: int) -> tuple[Int64Array, Float32Array]:
    """Indices and probabilities (N, J)."""
    named_count = message.named_count
    if message.class_count != class_count or not 1 <= named_count <= class_count:
        raise ValueError(
            f"expected 1 to {class_count} of {class_count} classes named, got {named_count} of {message.class_count}"
        )
    values = _float32s(message.values)
    if not values.size == len(message.indices) == picture_count * named_count:
        raise ValueError(
            f"expected {picture_count} x {named_count} classes and probabilities, got {len(message.indices)} "
            f"and {values.size}"
        )
    indices_NJ = np.array(message.indices, dtype=np.int64).reshape(picture_count, named_count)
    if ((indices_NJ < 0) | (indices_NJ >= class_count)).any():
        raise ValueError(f"expected class indices from 0 to {class_count - 1}, got others")
    if (np.diff(np.sort(indices_NJ, axis=1), axis=1) == 0).any():
        raise ValueError("expected each class named at most once for a picture, got one twice")
    values_NJ = _checked_values(values.reshape(picture_count, named_count))
    if (np.diff(values_NJ, axis=1) > 0).any():
        raise ValueError("expected the classes of each picture in falling order, got others")
    return indices_NJ, values_NJ


def _float32s(values: bytes) -> Float32Array:
    if len(values) % 4:
        raise ValueError(f"expected 4 bytes for each probability, got {len(values)} bytes")
    return np.frombuffer(values, dtype="<f4")


def _checked_values(values_NJ: Float32Array) -> Float32Array:
    if not (np.isfinite(values_NJ).all() and (values_NJ >= 0).all()):
        raise ValueError("expected finite probabilities of at least 0, got others")
    return values_NJ.astype(np.float32)


def _completed(sold_NJ: Float32Array, class_count: int, decimals: int | None) -> tuple[Float64Array, Float64Array]:
    """The values named, and what each other class gets (N, 1), from those sold of ``class_count`` in falling order.

    With h the largest rounding error, every true value lies in [v - h, v + h] and above 0, every other class's
    between 0 and the last one named, and all sum to 1. What comes back is of that kind: mass that is missing goes to
    the other classes, in equal parts, until they reach the last one named, and from there on to all classes alike;
    mass that is too much is taken from the values above 0 alike (each is 2h at least). What the tolerance still
    leaves of rounded values is divided out. Without rounding the values named stay as they are.
    """
    error = rounding_error(decimals)
    values_NJ = sold_NJ.astype(np.float64)
    others = class_count - values_NJ.shape[1]
    missing_N1 = 1.0 - values_NJ.sum(axis=1, keepdims=True)
    last_N1 = values_NJ[:, -1:] if others else np.zeros_like(missing_N1)
    most_N1 = others * last_N1 + class_count * error + SUM_TOLERANCE
    positive_N1 = (values_NJ > 0).sum(axis=1, keepdims=True)
    most_excess_N1 = positive_N1 * error + SUM_TOLERANCE
    wrong_N1 = (missing_N1 > most_N1) | (-missing_N1 > most_excess_N1)
    if wrong_N1.any():
        row = int(wrong_N1.argmax())
        raise ValueError(
            f"expected probabilities that sum to 1 for each picture, {_within(others, decimals)}; "
            f"got others, such as {1.0 - missing_N1[row, 0]:.6g}"
        )
    room_N1 = others * last_N1
    other_N1 = np.clip(missing_N1, 0.0, room_N1) / max(1, others)
    if decimals is None:
        return values_NJ, other_N1
    raised_N1 = np.clip((missing_N1 - room_N1) / class_count, 0.0, error)
    taken_N1 = np.clip(-missing_N1 / np.maximum(positive_N1, 1), 0.0, error)
    named_NJ = np.where(values_NJ > 0, values_NJ - taken_N1, 0.0) + raised_N1
    other_N1 += raised_N1
    sum_N1 = named_NJ.sum(axis=1, keepdims=True) + others * other_N1
    return named_NJ / sum_N1, other_N1 / sum_N1


def _within(others: int, decimals: int | None) -> str:
    explained = [f"{others} classes left out, none above the last one named"] if others else []
    explained += [f"rounding to {decimals} decimals"] if decimals is not None else []
    return "within " + " and ".join(["0.01", *explained])
