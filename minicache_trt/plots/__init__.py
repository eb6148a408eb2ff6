"""Figures. matplotlib is loaded when one is drawn, without a display."""
