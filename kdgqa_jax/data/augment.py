"""What happens to images on the device, inside the jitted step.

Hosts ship uint8 images; every random choice comes from one key per example, so results depend on
seed, step and position in the global batch alone: not on hosts, workers or batch mates (but for
mixup and cutmix, which mix each image with the one that stands as far from the end of the batch).
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from kdgqa_jax.data.randaugment import rand_augment
from kdgqa_jax.errors import UserError, check_rate

Array = jax.Array


def augment_config() -> ml_collections.ConfigDict:
    """Every option of training augmentation; the defaults are the published recipe."""
    return ml_collections.ConfigDict(
        {
            "rand_augment_ops": 2,  # operations of RandAugment per image; 0: off
            "rand_augment_magnitude": 9,  # of 0..30
            "flip": False,  # horizontally, every other image
            "pad_crop": 0,  # pixels of zero padding, from which a crop of the old size is taken
            "resized_crop": 1.0,  # least share of the area that a random resized crop keeps; 1: off
            "erase": 0.0,  # probability of random erasing
            "mixup": 0.0,  # alpha of mixup; 0: off
            "cutmix": 0.0,  # alpha of cutmix; 0: off; with mixup, each takes half of the steps
            "label_smoothing": 0.0,
        }
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for options out of range."""
    check_rate("label_smoothing", config.label_smoothing)
    if not 0.0 <= config.erase <= 1.0:
        raise UserError(f"augment.erase={config.erase} must be between 0 and 1")
    if not 0.0 < config.resized_crop <= 1.0:
        raise UserError(f"augment.resized_crop={config.resized_crop} must be in (0, 1]")
    for name in ("pad_crop", "mixup", "cutmix", "rand_augment_ops"):
        if config[name] < 0:
            raise UserError(f"augment.{name}={config[name]} must not be negative")
    if not 0 <= config.rand_augment_magnitude <= 30:
        raise UserError(
            f"augment.rand_augment_magnitude={config.rand_augment_magnitude} must be in 0..30"
        )


Statistic = float | tuple[float, ...]  # of pixel values in 0..1: one number, or one per channel


def to_model_input(
    images: Array, image_shape: tuple[int, int], mean: Statistic, std: Statistic
) -> Array:
    """uint8 (B, H, W, C) -> float32 (B, *image_shape, C): bilinear resize, then normalisation."""
    images = images.astype(jnp.float32) / 255.0
    if images.shape[1:3] != image_shape:
        shape = (images.shape[0], *image_shape, images.shape[3])
        images = jax.image.resize(images, shape, "bilinear")
    return _normalise(images, mean, std)


def _normalise(images: Array, mean: Statistic, std: Statistic) -> Array:
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))  # BHWC
    return (images - mean) / std


def training_batch(
    images: Array,
    labels: Array,
    rng: Array,
    config: ml_collections.FrozenConfigDict,
    image_shape: tuple[int, int],
    num_classes: int,
    mean: Statistic,
    std: Statistic,
) -> tuple[Array, Array]:
    """Augmented model input and its targets.

    In the order of the released code where it has the step: padded crop, flip and RandAugment at
    the size that the images have, then the resize to the model's size (with a random crop, if
    asked for), normalisation, random erasing, mixup or cutmix.

    Args:
      images: (B, H, W, C) uint8.
      labels: (B,) int32.
      rng: a key; that of an example is folded from it and its position in the batch.
      config: the fields of `augment_config()`.
      image_shape: (height, width) of the model.
      num_classes: of the model.
      mean: of pixel values in 0..1.
      std: of pixel values in 0..1.

    Returns:
      ((B, *image_shape, C) float32, labels (B,) int32, or (B, num_classes) float32 where mixing or
      smoothing makes them soft).
    """
    batch_rng, rng = jax.random.split(rng)
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(images.shape[0]))
    keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
    if config.pad_crop:
        images = jax.vmap(functools.partial(_pad_crop, pad=config.pad_crop))(images, keys[:, 0])
    if config.flip:
        chosen = jax.vmap(jax.random.bernoulli)(keys[:, 1])
        images = jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)
    if config.rand_augment_ops:
        images = rand_augment(
            images, keys[:, 2], config.rand_augment_ops, config.rand_augment_magnitude
        )
    if config.resized_crop < 1.0:
        crop = functools.partial(_resized_crop, shape=image_shape, least=config.resized_crop)
        images = jax.vmap(crop)(images, keys[:, 3])
        images = _normalise(images / 255.0, mean, std)
    else:
        images = to_model_input(images, image_shape, mean, std)
    if config.erase:
        images = jax.vmap(functools.partial(_erase, rate=config.erase))(images, keys[:, 4])
    if not (config.mixup or config.cutmix or config.label_smoothing):
        return images, labels
    targets = jax.nn.one_hot(labels, num_classes)
    targets = targets * (1.0 - config.label_smoothing) + config.label_smoothing / num_classes
    return _mix(images, targets, batch_rng, config.mixup, config.cutmix)


def _pad_crop(image: Array, key: Array, pad: int) -> Array:
    """A crop of the old size from the image with `pad` pixels of zeros around it: HWC -> HWC."""
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _box(key: Array, areas: tuple[float, float], ratios: tuple[float, float], size: Array) -> Array:
    """(top, left, height, width) float32 of a random box in an image of `size` (height, width).

    Its share of the area is uniform in `areas`, the logarithm of its shape uniform in `ratios`.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, minval=areas[0], maxval=areas[1]) * size[0] * size[1]
    low, high = jnp.log(jnp.asarray(ratios))
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=low, maxval=high))
    box = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), size)
    place = jax.random.uniform(place_key, (2,)) * (size - box)
    return jnp.concatenate([place, box])


def _resized_crop(image: Array, key: Array, shape: tuple[int, int], least: float) -> Array:
    """A random part of the image, of shape 3:4 to 4:3, resized: HWC -> (*shape, C) float32."""
    size = jnp.asarray(image.shape[:2], jnp.float32)
    box = _box(key, (least, 1.0), (3 / 4, 4 / 3), size)
    scale = jnp.asarray(shape, jnp.float32) / box[2:]
    out = (*shape, image.shape[2])
    return jax.image.scale_and_translate(
        image.astype(jnp.float32), out, (0, 1), scale, -box[:2] * scale, "bilinear"
    )


def _inside(box: Array, shape: tuple[int, int]) -> Array:
    """(H, W) bool: the pixels whose centre lies in a box (top, left, height, width)."""
    rows, columns = (jnp.arange(side, dtype=jnp.float32) + 0.5 for side in shape)
    row = (rows >= box[0]) & (rows < box[0] + box[2])
    column = (columns >= box[1]) & (columns < box[1] + box[3])
    return row[:, None] & column[None]


def _erase(image: Array, key: Array, rate: float) -> Array:
    """Zero (the mean, after normalisation) a random box of 2 to 33 % of the area: HWC -> HWC."""
    rate_key, box_key = jax.random.split(key)
    size = jnp.asarray(image.shape[:2], jnp.float32)
    inside = _inside(_box(box_key, (0.02, 0.33), (0.3, 3.3), size), image.shape[:2])
    erased = jax.random.bernoulli(rate_key, rate) & inside
    return jnp.where(erased[..., None], 0.0, image)


def _mix(
    images: Array, targets: Array, rng: Array, mixup: float, cutmix: float
) -> tuple[Array, Array]:
    """Mixup or cutmix of the batch with itself in reverse order; one ratio for the batch."""
    if not mixup and not cutmix:
        return images, targets
    choice_key, mixup_key, cutmix_key, place_key = jax.random.split(rng, 4)
    use_cutmix = jax.random.bernoulli(choice_key, 0.5) if mixup and cutmix else bool(cutmix)
    other = images[::-1]
    kept = jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0)
    mixed = kept * images + (1.0 - kept) * other

    share = jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0)
    size = jnp.asarray(images.shape[1:3], jnp.float32)
    sides = jnp.round(size * jnp.sqrt(1.0 - share))
    place = jnp.floor(jax.random.uniform(place_key, (2,)) * (size - sides + 1.0))
    inside = _inside(jnp.concatenate([place, sides]), images.shape[1:3])
    cut = jnp.where(inside[..., None], other, images)

    images = jnp.where(use_cutmix, cut, mixed)
    kept = jnp.where(use_cutmix, 1.0 - jnp.mean(inside), kept)
    return images, kept * targets + (1.0 - kept) * targets[::-1]
