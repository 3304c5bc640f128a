"""Load for serve.py.

pip install locust
locust -f docs/examples/locustfile.py --headless -u 16 -t 30s -H http://localhost:8000
"""

from __future__ import annotations

import random

from locust import HttpUser, constant, task

WORDS = ["cat", "mat", "sits", "on", "the", "compiled", "code", "starts", "quickly", "kept", "disk"]


class Caller(HttpUser):
    """One after the other, sentences of 3 to 60 words."""

    wait_time = constant(0)

    @task
    def embed(self) -> None:
        """One request of one to four sentences."""
        count = random.randint(1, 4)
        sentences = [" ".join(random.choices(WORDS, k=random.randint(3, 60))) for _ in range(count)]
        self.client.post("/embed", json={"sentences": sentences})
