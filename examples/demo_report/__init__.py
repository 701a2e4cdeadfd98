"""What the demo shows of itself: pictures, and one page to look at in a browser."""

from .page import Sample, write_page
from .pictures import Attention, draw_attention, draw_history

__all__ = ["Attention", "Sample", "draw_attention", "draw_history", "write_page"]
