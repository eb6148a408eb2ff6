# python examples/triton/client.py PROMPT [--model minicache] [--url 127.0.0.1:8001] [--max-tokens 64]
import argparse
import queue
import signal
import sys

import numpy as np
import tritonclient.grpc as grpc

sys.excepthook = lambda kind, error, _: print(f"error: {error}", file=sys.stderr) or globals().pop("client", None)
parser = argparse.ArgumentParser(description="Streams a completion over gRPC, with TensorRT-LLM's llmapi tensors.")
for name, default in (("prompt", ""), ("--model", "minicache"), ("--url", "127.0.0.1:8001"), ("--max-tokens", 64)):
    parser.add_argument(name, default=default, type=type(default))
args, replies, shown, final = parser.parse_args(), queue.SimpleQueue(), "", False
values = {"text_input": np.array([args.prompt.encode()]), "sampling_param_max_tokens": np.int32([args.max_tokens])}
values |= {"streaming": np.array([True]), "sampling_param_exclude_input_from_output": np.array([True])}
inputs = [grpc.InferInput(k, [1], grpc.np_to_triton_dtype(x.dtype)).set_data_from_numpy(x) for k, x in values.items()]
with grpc.InferenceServerClient(args.url) as client:
    client.get_model_metadata(args.model)  # says at once when the server or the model is not there
    client.start_stream(callback=lambda result, error: replies.put((result, error)))
    client.async_stream_infer(args.model, inputs, enable_empty_final_response=True)
    signal.signal(signal.SIGINT, lambda *_: client.stop_stream(cancel_requests=True))
    while not final:
        reply, error = replies.get()
        if error is not None:
            raise error
        final, text = reply.get_response().parameters["triton_final_response"].bool_param, reply.as_numpy("text_output")
        print("" if text is None else text[0].decode()[len(shown) :], end="\n" if final else "", flush=True)
        shown = shown if text is None else text[0].decode()  # a response holds all of the text so far
globals().pop("client")  # before the library it needs at its end is taken apart
