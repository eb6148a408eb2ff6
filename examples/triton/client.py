"""Streams a completion from Triton over gRPC, with the tensors of TensorRT-LLM's llmapi model.

python examples/triton/client.py "def main(argv):" [--model minicache] [--url 127.0.0.1:8001] [--max-tokens 64]
"""

import argparse
import queue

import numpy as np
import tritonclient.grpc as grpc

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", default="minicache")
parser.add_argument("--url", default="127.0.0.1:8001")
parser.add_argument("--max-tokens", type=int, default=64)
options = parser.parse_args()


def tensor(name, values, dtype, triton_type):
    made = grpc.InferInput(name, [len(values)], triton_type)
    made.set_data_from_numpy(np.array(values, dtype))
    return made


results = queue.Queue()
with grpc.InferenceServerClient(options.url) as client:
    client.start_stream(callback=lambda result, error: results.put((result, error)))
    inputs = [
        tensor("text_input", [options.prompt.encode()], np.object_, "BYTES"),
        tensor("sampling_param_max_tokens", [options.max_tokens], np.int32, "INT32"),
        tensor("streaming", [True], bool, "BOOL"),
    ]
    client.async_stream_infer(options.model, inputs, enable_empty_final_response=True)
    shown, final = "", False
    while not final:
        result, error = results.get()
        if error is not None:
            raise SystemExit(f"error: {error}")
        final = result.get_response().parameters["triton_final_response"].bool_param
        if (texts := result.as_numpy("text_output")) is not None:
            text = texts[0].decode()  # everything so far
            print(text[len(shown) :], end="", flush=True)
            shown = text
print()
