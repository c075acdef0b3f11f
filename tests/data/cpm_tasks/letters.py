"""A tokenizer of single characters, for tests that need to see the ids."""

from __future__ import annotations

import numpy as np


class Letters:
    """Id 10 and up: characters; 是 is 5; anything beyond id 399 is unknown."""

    vocab_size, bos_id, start_id, eos_id, pad_id, unk_id, fingerprint = 400, 6, 6, 7, 0, 1, "letters"

    def encode(self, text):
        return [5 if c == "是" else 1 if ord(c) > 399 else max(10, ord(c)) for c in text]

    def encode_batch(self, texts):
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids):
        return "".join("是" if i == 5 else chr(i) for i in ids)
