// From a format known when the kernel runs to code compiled for it.
#pragma once

#include <type_traits>

#include "minicache/formats.cuh"
#include "minicache/pairs.cuh"

namespace minicache {

// What a row in a format is read as.
template <class T, Format F>
struct ElementOf {
  using type = Code<T>;
};
template <class T>
struct ElementOf<T, Format::model> {
  using type = T;
};
template <class T, Format F>
using Element = typename ElementOf<T, F>::type;

template <Format F>
struct FormatTag {
  static constexpr Format value = F;
};

// Which formats a place in the code has to do with; `with` calls `f` with the tag of the one. Any that is stored:
struct AnyFormat {
  template <class F>
  MC_HD static void with(Format format, F f) {
    switch (format) {
      case Format::model:
        return f(FormatTag<Format::model>{});
      case Format::fp8:
        return f(FormatTag<Format::fp8>{});
      case Format::int8:
        return f(FormatTag<Format::int8>{});
      case Format::int4:
        return f(FormatTag<Format::int4>{});
      case Format::int2:
        return f(FormatTag<Format::int2>{});
      case Format::g4:
        return f(FormatTag<Format::g4>{});
      case Format::g3:
        return f(FormatTag<Format::g3>{});
      case Format::g2:
        return f(FormatTag<Format::g2>{});
      case Format::g1:
        return f(FormatTag<Format::g1>{});
      case Format::drop:
        return;
    }
  }
};

// Of retained vectors.
struct RetainedFormat {
  template <class F>
  MC_HD static void with(Format format, F f) {
    switch (format) {
      case Format::model:
        return f(FormatTag<Format::model>{});
      case Format::fp8:
        return f(FormatTag<Format::fp8>{});
      case Format::int8:
        return f(FormatTag<Format::int8>{});
      default:
        return f(FormatTag<Format::int4>{});
    }
  }
};

// One that is known.
template <Format Known>
struct OneFormat {
  static constexpr Format format = Known;
  template <class F>
  MC_HD static void with(Format, F f) {
    f(FormatTag<Known>{});
  }
};

}  // namespace minicache
