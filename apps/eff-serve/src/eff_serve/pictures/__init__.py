"""Pictures in chats: reading what a client sends, and showing it to the model."""

from eff_serve.pictures.data_url import PictureError, read_picture
from eff_serve.pictures.eyes import Eyes

__all__ = ["Eyes", "PictureError", "read_picture"]
