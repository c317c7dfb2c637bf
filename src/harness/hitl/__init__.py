"""People in the loop: what may happen without asking, and who is asked."""

from __future__ import annotations
