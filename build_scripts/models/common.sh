# Sourced by the scripts beside it: one per model of the MiniCache paper.

# Builds an engine; what the user gives comes last, and so wins over the defaults.
build_model() {  # preset, first merged layer, max_seq_len, the user's arguments ...
  local preset="$1" start="$2" length="$3" argument
  shift 3
  local compression=(--method minicache4 --merge-start "$start") output=(--output "engines/$preset")
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        cat <<TEXT
Usage: $(basename "$0") [OPTIONS OF minicache-trt build]

Builds engines/$preset: $preset from the Hugging Face Hub, layers merged in pairs from $start on, 4-bit directions,
sequences up to $length tokens. Options override that:

  --model PLACE          another checkpoint of the same model (a directory, a TensorRT-LLM checkpoint, a GGUF file)
  --method NAME          another compression (with its own merge start); --merge-start N; --plan FILE
  --backend NAME         onnxruntime (default), cuda, torch: see minicache-trt build --help
  --weights int4         weight-only 4 bits
  --load-format dummy    the model's shape without its weights: seconds, and nothing is downloaded
  --output DIR           where the engine goes
TEXT
        exit 0
        ;;
      --method | --method=* | --plan | --plan=*) compression=() ;;
      -o | -o?* | --output | --output=* | --output[-_]dir | --output[-_]dir=*) output=() ;;
    esac
  done
  command -v minicache-trt > /dev/null || {
    echo "error: minicache-trt is not on PATH" >&2
    echo "hint: pip install . in the repository, or make setup and add .venv/bin to PATH" >&2
    exit 2
  }
  exec minicache-trt build --model "$preset" "${compression[@]}" --max-seq-len "$length" "${output[@]}" "$@"
}
