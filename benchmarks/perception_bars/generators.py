"""Degradations by other people's code, or by other formulas than the package's own.

Each takes (H, W, 3) uint8 pixels, a strength in [0, 1] and a seed. The strengths were chosen by
eye: 0 is about as visible as the package's own degradation at a severity of 0.3, 1 as at 0.8.
"""

import io
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import albumentations
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegPresets import presets
from skimage.util import random_noise

Pixels: TypeAlias = NDArray[np.uint8]
Generator: TypeAlias = Callable[[Pixels, float, int], Pixels]


def gaussian_blur(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """OpenCV's Gaussian, sigma 1.4 to 3.3."""
    return cv2.GaussianBlur(pixels, (0, 0), _between(1.4, 3.3, strength))


def motion_blur(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """A straight line of 7 to 17 pixels."""
    length = 2 * round(_between(3, 8, strength)) + 1
    return _albumentation(albumentations.MotionBlur((length, length), p=1), pixels, seed)


def defocus(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """A disc of radius 2 to 5, its edge softened."""
    radius = round(_between(2, 5, strength))
    return _albumentation(albumentations.Defocus((radius, radius), p=1), pixels, seed)


def opencv_jpeg(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """OpenCV's encoder, quality 40 to 10, chroma at full resolution.

    With halved chroma its files decode to the same pixels as torchvision's.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, round(40 * (10 / 40) ** strength)]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imdecode(cv2.imencode(".jpg", pixels[..., ::-1], options)[1], 1)[..., ::-1].copy()


def pillow_jpeg(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Pillow's encoder, its quantisation tables "web_low" times 1 to 3.5, chroma halved one way."""
    factor = _between(1, 3.5, strength)
    coarse = [
        [min(255, round(factor * step)) for step in steps]
        for steps in presets["web_low"]["quantization"]
    ]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", qtables=coarse, subsampling="4:2:2", optimize=True)
    return np.array(Image.open(file))


def gaussian_noise(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """White noise, sigma 10 to 36 on the 8-bit scale."""
    variance = (_between(10, 36, strength) / 255) ** 2
    return _to_bytes(random_noise(pixels, "gaussian", rng=seed, var=variance))


def speckle(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Noise in proportion to the signal, sigma 0.09 to 0.32 of it."""
    variance = _between(0.09, 0.32, strength) ** 2
    return _to_bytes(random_noise(pixels, "speckle", rng=seed, var=variance))


def poisson(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Shot noise of 256 photons in white, or of 11 times fewer, brightened again."""
    times = _between(1, 11, strength)
    noisy = random_noise(pixels / (255 * times), "poisson", rng=seed, clip=False)
    return _to_bytes(times * noisy)


def iso_noise(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """A camera's noise of lightness and hue, intensity 0.2 to 0.5."""
    intensity, shift = _between(0.2, 0.5, strength), _between(0.02, 0.05, strength)
    noise = albumentations.ISONoise((shift, shift), (intensity, intensity), p=1)
    return _albumentation(noise, pixels, seed)


def drawn_rain(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Thin lines drawn by albumentations, all alike and of one slant."""
    rain = albumentations.RandomRain(
        slant_range=(-10, 10),
        drop_length=round(_between(14, 30, strength)),
        drop_color=(round(_between(130, 180, strength)),) * 3,
        blur_value=2,
        brightness_coefficient=1,
        rain_type=("default", "heavy", "torrential")[round(2 * strength)],
        p=1,
    )
    return _albumentation(rain, pixels, seed)


def added_rain(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Lines of different lengths and brightness, smoothed, and added to the scene."""
    random = np.random.default_rng(seed)
    height, width = pixels.shape[:2]
    layer = np.zeros((height, width), np.uint8)
    slant = random.uniform(-0.5, 0.5)
    for _ in range(round(_between(8e-4, 2.2e-3, strength) * height * width)):
        x, y = random.uniform(0, width), random.uniform(-20, height)
        length = random.uniform(0.5, 1.5) * _between(12, 28, strength)
        end = (round(x + slant * length), round(y + length))
        brightness = random.uniform(0.4, 1) * _between(140, 220, strength)
        cv2.line(layer, (round(x), round(y)), end, brightness, 1, cv2.LINE_AA)
    layer = cv2.GaussianBlur(layer, (0, 0), 0.6)
    return cv2.add(pixels, np.repeat(layer[..., None], 3, axis=2))


def veil(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """An even veil of light gray over 35 to 70 % of the light, at no depth in particular."""
    share, light = _between(0.35, 0.7, strength), 200 + seed % 50
    return cv2.addWeighted(pixels, 1 - share, np.full_like(pixels, light), share, 0)


def sloped_veil(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Scattering in linear light, the distance growing evenly across the image from 0.3 to 1."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : pixels.shape[0] * 1j, 0 : 1 : pixels.shape[1] * 1j]
    across = random.uniform(-0.5, 0.5)
    slope = (1 - rows) + across * columns
    distance = 0.3 + 0.7 * (slope - slope.min()) / np.ptp(slope)
    clear = np.exp(-_between(0.25, 1.1, strength) * distance)[..., None]
    light = random.uniform(0.5, 0.9)
    return _to_bytes(_encoded(_linear(pixels) * clear + light * (1 - clear)))


def dimmed(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Values to the power of 1.5 to 3, and 0.7 to 0.4 of that."""
    return _to_bytes(_between(0.7, 0.4, strength) * (pixels / 255) ** _between(1.5, 3, strength))


def fewer_stops(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Linear light divided by 4 to 32, 2 to 5 stops."""
    return _to_bytes(_encoded(_linear(pixels) * 2 ** -_between(2, 5, strength)))


def shrink_and_enlarge(pixels: Pixels, strength: float, seed: int) -> Pixels:
    """Means over areas, 2.5 to 5 times smaller, and bilinear enlargement."""
    height, width = pixels.shape[:2]
    factor = _between(2.5, 5, strength)
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    coarse = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


FOREIGN: Final[dict[str, tuple[str, Generator]]] = {
    "Gaussian blur (OpenCV)": ("blur", gaussian_blur),
    "motion blur (albumentations)": ("blur", motion_blur),
    "defocus (albumentations)": ("blur", defocus),
    "JPEG 4:4:4 (OpenCV)": ("jpeg", opencv_jpeg),
    "JPEG 4:2:2, other tables (Pillow)": ("jpeg", pillow_jpeg),
    "Gaussian noise (scikit-image)": ("noise", gaussian_noise),
    "speckle (scikit-image)": ("noise", speckle),
    "Poisson noise (scikit-image)": ("noise", poisson),
    "ISO noise (albumentations)": ("noise", iso_noise),
    "rain (albumentations)": ("rain", drawn_rain),
    "added lines (OpenCV)": ("rain", added_rain),
    "even veil (OpenCV)": ("haze", veil),
    "sloped veil in linear light (NumPy)": ("haze", sloped_veil),
    "power and scale (NumPy)": ("low_light", dimmed),
    "fewer stops of linear light (NumPy)": ("low_light", fewer_stops),
    "area down, bilinear up (OpenCV)": ("blur", shrink_and_enlarge),
}
"""For each generator, what a perceiver should call it, and the generator."""


def _between(low: float, high: float, strength: float) -> float:
    return low + (high - low) * strength


def _linear(pixels: Pixels) -> NDArray[np.float64]:
    """Linear light of sRGB values."""
    encoded = pixels / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Encode linear light as sRGB values."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _to_bytes(values: NDArray[Any]) -> Pixels:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def _albumentation(transform: Any, pixels: Pixels, seed: int) -> Pixels:
    transform.set_random_seed(seed)
    return transform(image=pixels)["image"]
