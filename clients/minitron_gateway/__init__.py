"""OpenAI's HTTP in front of one or several Triton servers: ``minitron gateway``.

Text is made by ``minitron.text`` over the servers' ``tensorrt_llm``. Here is HTTP: ``bodies`` (what may be
asked), ``shapes`` (what is answered), ``problems`` (errors), ``upstreams`` (which server), ``app`` (the endpoints), and
``serving`` (processes, signals, drain). The API is OpenAI's (platform.openai.com/docs/api-reference), with the
parameters that vLLM's server added to it (min_tokens, ignore_eos, top_k, min_p, repetition_penalty).
"""
