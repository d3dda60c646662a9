"""High dynamic range and wide colours as BT.709 colours of standard range, which the models know.

The steps are those of FFmpeg's ``zscale=t=linear:npl=100,zscale=p=bt709,tonemap=mobius:param=0.5:desat=0,zscale=t=bt709``, with
tables, because PyAV's build of FFmpeg has no ``zscale``: signal to light, BT.2020 or P3 to BT.709, tone curve, light to signal.
"""

from __future__ import annotations

from functools import cache

import numpy as np

WHITE_NITS, PEAK_NITS = 100.0, 1000.0
"""White as ``tonemap`` has it, and the light that becomes white."""
_KNEE = 0.5
"""Share of white above which light is compressed."""
_DISPLAY_GAMMA = 2.4  # of a display of standard range, ITU-R BT.1886; ``zscale`` uses it too
_STEPS = 2**16
_BAND_PX = 2**18  # converted at once, so that a large frame takes little more memory than its pixels
_TO_BT709 = {
    # ITU-R BT.2087-0, section 4.2: BT.2020 to BT.709 in linear light.
    "bt2020": ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    # From the chromaticities of SMPTE EG 432-1 (Display P3), both with D65 as white.
    "p3": ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}


def to_standard(signal: np.ndarray, transfer: str, primaries: str) -> np.ndarray:
    """uint8 [H, W, 3] of BT.709.

    Args:
        signal: uint16 [H, W, 3], full range.
        transfer: ``pq`` (SMPTE ST 2084), ``hlg`` (ARIB STD-B67) or ``sdr``.
        primaries: ``bt2020``, ``p3`` or ``bt709``.
    """
    shown = np.empty(signal.shape, np.uint8)
    rows = max(1, _BAND_PX // signal.shape[1])
    for top in range(0, len(signal), rows):
        shown[top : top + rows] = _convert(signal[top : top + rows], transfer, primaries)
    return shown


def _convert(signal: np.ndarray, transfer: str, primaries: str) -> np.ndarray:
    light = _make_light_table(transfer)[signal]
    if primaries in _TO_BT709:
        light = light @ np.array(_TO_BT709[primaries], np.float32).T
    if transfer != "sdr":
        brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
        light *= _compress(brightest) / brightest
    # By the root of the light, so that dark shades, where the signal rises fastest, lie apart in the table.
    return _make_signal_table()[np.rint(np.sqrt(np.clip(light, 0, 1)) * (_STEPS - 1)).astype(np.uint16)]


def _compress(light: np.ndarray) -> np.ndarray:
    """The Möbius curve of FFmpeg's ``tonemap``: the identity up to the knee, then with the same slope up to 1 at the peak."""
    peak = PEAK_NITS / WHITE_NITS
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    scale = (b * b + 2 * b * _KNEE + _KNEE**2) / (b - a)
    return np.where(light <= _KNEE, light, scale * (light + a) / (light + b)).astype(np.float32)


@cache
def _make_light_table(transfer: str) -> np.ndarray:
    """float32 [65536]: light by signal, in units of `WHITE_NITS`."""
    signal = np.linspace(0, 1, _STEPS)
    if transfer == "pq":  # SMPTE ST 2084, equation 4
        root = signal ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610) * (10000 / WHITE_NITS)
    elif transfer == "hlg":
        # ITU-R BT.2100-2, table 5, on a display of 1000 nits, whose gamma of 1.2 is applied to each channel, as ``zscale`` does.
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        light = scene**1.2 * (PEAK_NITS / WHITE_NITS)
    else:
        light = signal**_DISPLAY_GAMMA
    return light.astype(np.float32)


@cache
def _make_signal_table() -> np.ndarray:
    """uint8 [65536]: signal by the root of the light."""
    return np.rint(255 * np.linspace(0, 1, _STEPS) ** (2 / _DISPLAY_GAMMA)).astype(np.uint8)
