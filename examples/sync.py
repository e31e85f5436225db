"""Ask once and wait for the whole answer."""

import sys

from minitron_client import Client

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

with Client(url, deadline_s=60) as client:
    answer = client.generate("In the beginning", max_tokens=24, temperature=0.0)
    print(answer.text)
    print(f"{answer.token_count} tokens, finish reason {answer.finish_reason}")
