"""Numbers of the codec that every implementation shares."""

from __future__ import annotations

SMALL_ANGLE = 1e-4
"""Below this angle (radians) SLERP becomes a normalised linear interpolation."""
ANTIPODAL_MARGIN = 1e-3
"""Above pi minus this angle the later layer's direction is taken."""
FIRST_SCORE = 4.0
"""Retention score of tokens without a meaningful angle (antipodal or zero): above every angle."""
FLOAT16_MAX = 65504.0
"""Scales, minima and norms beyond it saturate."""
