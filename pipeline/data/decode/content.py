"""What is decoded: a member's bytes, or a copy of them out of memory that is used again."""

Content = bytes | bytearray
