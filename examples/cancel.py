"""Stop reading when there is enough: leaving the loop cancels the request, and the engine stops generating it."""

import sys

from minitron.errors import DeadlineExceeded
from minitron_client import Client

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

with Client(url) as client:
    words = 0
    for chunk in client.stream("In the beginning", max_tokens=1000):
        words += chunk.text.count(" ")
        if words >= 5:
            break
    print(f"left after {words} words")

    try:  # a deadline ends it as well
        client.generate("In the beginning", max_tokens=1000, ignore_end=True, deadline_s=0.1)
    except DeadlineExceeded as error:
        print(error)
