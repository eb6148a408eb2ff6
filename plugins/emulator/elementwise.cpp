#include "elementwise.h"

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace emulator {
namespace {

// The handler of an elementwise function for the types it can have, by `type`.
template <class F>
Handler arithmetic(Type type, F f) {
  switch (type) {
    case Type::u16:
    case Type::b16:
      return apply<u16, u16, u16>(f);
    case Type::s16:
      return apply<s16, s16, s16>(f);
    case Type::u32:
    case Type::b32:
      return apply<u32, u32, u32>(f);
    case Type::s32:
      return apply<s32, s32, s32>(f);
    case Type::u64:
    case Type::b64:
      return apply<u64, u64, u64>(f);
    case Type::s64:
      return apply<s64, s64, s64>(f);
    case Type::f32:
      return apply<float, float, float>(f);
    case Type::f64:
      return apply<double, double, double>(f);
    default:
      return nullptr;
  }
}

template <class F>
Handler bitwise(Type type, F f) {
  switch (bytes_of(type)) {
    case 2:
      return apply<u16, u16, u16>(f);
    case 4:
      return apply<u32, u32, u32>(f);
    case 8:
      return apply<u64, u64, u64>(f);
    default:
      return nullptr;
  }
}

template <class F>
Handler unary(Type type, F f) {
  switch (type) {
    case Type::u16:
    case Type::b16:
      return apply<u16, u16>(f);
    case Type::s16:
      return apply<s16, s16>(f);
    case Type::u32:
    case Type::b32:
      return apply<u32, u32>(f);
    case Type::s32:
      return apply<s32, s32>(f);
    case Type::u64:
    case Type::b64:
      return apply<u64, u64>(f);
    case Type::s64:
      return apply<s64, s64>(f);
    case Type::f32:
      return apply<float, float>(f);
    case Type::f64:
      return apply<double, double>(f);
    default:
      return nullptr;
  }
}

template <class F>
Handler compare(Type type, F) {
  switch (type) {
    case Type::u16:
    case Type::b16:
      return &Compare<F, u16>::run;
    case Type::s16:
      return &Compare<F, s16>::run;
    case Type::u32:
    case Type::b32:
      return &Compare<F, u32>::run;
    case Type::s32:
      return &Compare<F, s32>::run;
    case Type::u64:
    case Type::b64:
      return &Compare<F, u64>::run;
    case Type::s64:
      return &Compare<F, s64>::run;
    case Type::f32:
      return &Compare<F, float>::run;
    case Type::f64:
      return &Compare<F, double>::run;
    default:
      return nullptr;
  }
}

// Integers.

// Numbers of type From in registers of type Held, at least as wide, into registers of `width` bytes: extended as their
// own type says.
template <class From, class Held>
Handler from_integer(Type to, int width) {
  auto into = [&](auto number) -> Handler {
    using To = decltype(number);
    auto convert = [](Held x) { return static_cast<To>(static_cast<From>(x)); };
    using Wide = std::conditional_t<std::is_signed_v<To>, s32, u32>;
    using Narrow = std::conditional_t<std::is_signed_v<To>, s16, u16>;
    if constexpr (sizeof(To) >= 4) return apply<To, Held>(convert);
    return width == 2 ? apply<Narrow, Held>(convert) : apply<Wide, Held>(convert);
  };
  switch (to) {
    case Type::u8:
      return into(u8{});
    case Type::s8:
      return into(s8{});
    case Type::u16:
      return into(u16{});
    case Type::s16:
      return into(s16{});
    case Type::u32:
      return into(u32{});
    case Type::s32:
      return into(s32{});
    case Type::u64:
      return into(u64{});
    case Type::s64:
      return into(s64{});
    case Type::f32:
      return into(float{});
    case Type::f64:
      return into(double{});
    default:
      return nullptr;
  }
}

template <class From>
Handler from_register(Type to, int width, int held) {
  if (held == 2) return from_integer<From, u16>(to, width);
  if (held == 4) return from_integer<From, u32>(to, width);
  return from_integer<From, u64>(to, width);
}

template <class From>
Handler float_to_integer(Type to, const std::string& rounding) {
  auto chosen = [&](auto round) -> Handler {
    using Round = decltype(round);
    switch (to) {
      case Type::u16:
        return apply<u16, From>([](From x) { return saturated<u16>(Round{}(x)); });
      case Type::s16:
        return apply<s16, From>([](From x) { return saturated<s16>(Round{}(x)); });
      case Type::u32:
        return apply<u32, From>([](From x) { return saturated<u32>(Round{}(x)); });
      case Type::s32:
        return apply<s32, From>([](From x) { return saturated<s32>(Round{}(x)); });
      case Type::s64:
        return apply<s64, From>([](From x) { return saturated<s64>(Round{}(x)); });
      case Type::f32:
        return apply<float, From>([](From x) { return static_cast<float>(Round{}(x)); });
      case Type::f64:
        return apply<double, From>([](From x) { return static_cast<double>(Round{}(x)); });
      default:
        return nullptr;
    }
  };
  if (rounding == "rzi") return chosen([](From x) { return std::trunc(static_cast<double>(x)); });
  if (rounding == "rni") return chosen([](From x) { return std::nearbyint(static_cast<double>(x)); });
  if (rounding == "rmi") return chosen([](From x) { return std::floor(static_cast<double>(x)); });
  if (rounding == "rpi") return chosen([](From x) { return std::ceil(static_cast<double>(x)); });
  return nullptr;
}

template <class F>
u32 by_halves(u32 a, u32 b, u32 c, F f) {
  const u16 low = f(static_cast<u16>(a), static_cast<u16>(b), static_cast<u16>(c));
  const u16 high = f(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16), static_cast<u16>(c >> 16));
  return low | static_cast<u32>(high) << 16;
}

u32 permuted(u32 a, u32 b, u32 selection) {
  const u64 bytes = a | static_cast<u64>(b) << 32;
  u32 result = 0;
  for (int n = 0; n < 4; ++n) {
    const u32 pick = selection >> 4 * n & 15u;
    u32 byte = static_cast<u32>(bytes >> 8 * (pick & 7u)) & 255u;
    if (pick & 8u) byte = byte & 128u ? 255u : 0u;
    result |= byte << 8 * n;
  }
  return result;
}

template <class T>
T inserted(T a, T b, u32 position, u32 length) {
  position &= 255u, length &= 255u;
  constexpr u32 kBits = 8 * sizeof(T);
  if (position >= kBits || length == 0) return b;
  const T mask = static_cast<T>(length >= kBits ? ~T{0} : (T{1} << length) - 1) << position;
  return (b & ~mask) | ((a << position) & mask);
}

template <class T>
T extracted(T a, u32 position, u32 length, bool sign) {
  position &= 255u, length &= 255u;
  constexpr u32 kBits = 8 * sizeof(T);
  if (length == 0) return 0;
  const u32 last = std::min(position + length - 1, kBits - 1);
  const bool negative = sign && (a >> last & 1u);
  T result = 0;
  for (u32 n = 0; n < kBits; ++n) {
    const bool bit = n < length && position + n < kBits ? (a >> (position + n) & 1u) : negative;
    result |= static_cast<T>(bit) << n;
  }
  return result;
}

// Products of two 16-bit floats and a sum are exact in double, as far as one rounding to 16 bits can tell.
Handler in_halves(const std::string& op) {
  if (op == "fma") {
    return apply<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
      return by_halves(a, b, c, [](u16 x, u16 y, u16 z) {
        return float_to_half(static_cast<double>(half_to_float(x)) * half_to_float(y) + half_to_float(z));
      });
    });
  }
  if (op == "add" || op == "sub" || op == "mul") {
    auto of = [](auto f) {
      return apply<u32, u32, u32>([](u32 a, u32 b) {
        return by_halves(a, b, 0u, [](u16 x, u16 y, u16) {
          return float_to_half(decltype(f){}(half_to_float(x), half_to_float(y)));
        });
      });
    };
    if (op == "add") return of([](double a, double b) { return a + b; });
    if (op == "sub") return of([](double a, double b) { return a - b; });
    return of([](double a, double b) { return a * b; });
  }
  return nullptr;
}

// The table says what becomes of each combination of three bits.
void table_of_three(Block&, Warp& warp, const Instruction& i, u32 mask) {
  u32* const d = warp.at<u32>(i.x[0]);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const u32 a = warp.at<u32>(i.x[1])[lane], b = warp.at<u32>(i.x[2])[lane], c = warp.at<u32>(i.x[3])[lane];
    u32 result = 0;
    for (int n = 0; n < 8; ++n) {
      if (i.x[4] >> n & 1u) result |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    }
    d[lane] = result;
  }
}

}  // namespace

Handler comparison(const std::string& name, Type type) {
  if (name == "eq") return compare(type, [](auto a, auto b) { return a == b; });
  if (name == "ne") return compare(type, [](auto a, auto b) { return a < b || a > b; });
  if (name == "lt" || name == "lo") return compare(type, [](auto a, auto b) { return a < b; });
  if (name == "le" || name == "ls") return compare(type, [](auto a, auto b) { return a <= b; });
  if (name == "gt" || name == "hi") return compare(type, [](auto a, auto b) { return a > b; });
  if (name == "ge" || name == "hs") return compare(type, [](auto a, auto b) { return a >= b; });
  if (name == "equ") return compare(type, [](auto a, auto b) { return !(a < b || a > b); });
  if (name == "neu") return compare(type, [](auto a, auto b) { return a != b; });
  if (name == "ltu") return compare(type, [](auto a, auto b) { return !(a >= b); });
  if (name == "leu") return compare(type, [](auto a, auto b) { return !(a > b); });
  if (name == "gtu") return compare(type, [](auto a, auto b) { return !(a <= b); });
  if (name == "geu") return compare(type, [](auto a, auto b) { return !(a < b); });
  if (name == "num") return compare(type, [](auto a, auto b) { return a == a && b == b; });
  if (name == "nan") return compare(type, [](auto a, auto b) { return a != a || b != b; });
  return nullptr;
}

Handler conversion(Type to, Type from, const std::string& rounding, int width, int held) {
  switch (from) {
    case Type::u8:
      return from_register<u8>(to, width, held);
    case Type::s8:
      return from_register<s8>(to, width, held);
    case Type::u16:
      return from_register<u16>(to, width, held);
    case Type::s16:
      return from_register<s16>(to, width, held);
    case Type::u32:
      return from_register<u32>(to, width, held);
    case Type::s32:
      return from_register<s32>(to, width, held);
    case Type::u64:
      return from_register<u64>(to, width, held);
    case Type::s64:
      return from_register<s64>(to, width, held);
    default:
      break;
  }
  if (from == Type::f16 && to == Type::f32) return apply<float, u16>([](u16 x) { return half_to_float(x); });
  if (from == Type::bf16 && to == Type::f32) return apply<float, u16>([](u16 x) { return bfloat_to_float(x); });
  if (from == Type::f32 && to == Type::f16) return apply<u16, float>([](float x) { return float_to_half(x); });
  if (from == Type::f32 && to == Type::bf16) return apply<u16, float>([](float x) { return float_to_bfloat(x); });
  if (from == Type::f32 && to == Type::f64) return apply<double, float>([](float x) { return x; });
  if (from == Type::f64 && to == Type::f32 && rounding == "rn") return apply<float, double>([](double x) { return x; });
  if (from == Type::f32) return float_to_integer<float>(to, rounding);
  if (from == Type::f64) return float_to_integer<double>(to, rounding);
  return nullptr;
}

Handler pair_conversion(Type to) {
  if (to == Type::f16x2) {
    return apply<u32, float, float>(
        [](float high, float low) { return float_to_half(low) | static_cast<u32>(float_to_half(high)) << 16; });
  }
  return apply<u32, float, float>(
      [](float high, float low) { return float_to_bfloat(low) | static_cast<u32>(float_to_bfloat(high)) << 16; });
}

Handler elementwise(const Statement& statement, Type type) {
  const std::string& op = statement.opcode;
  if (op == "add") return arithmetic(type, [](auto a, auto b) { return a + b; });
  if (op == "sub") return arithmetic(type, [](auto a, auto b) { return a - b; });
  if (op == "min") {
    if (type == Type::f32) return apply<float, float, float>([](float a, float b) { return std::fmin(a, b); });
    return arithmetic(type, [](auto a, auto b) { return b < a ? b : a; });
  }
  if (op == "max") {
    if (type == Type::f32) return apply<float, float, float>([](float a, float b) { return std::fmax(a, b); });
    return arithmetic(type, [](auto a, auto b) { return a < b ? b : a; });
  }
  if (op == "and") return bitwise(type, [](auto a, auto b) { return a & b; });
  if (op == "or") return bitwise(type, [](auto a, auto b) { return a | b; });
  if (op == "xor") return bitwise(type, [](auto a, auto b) { return a ^ b; });
  if (op == "not") {
    return bytes_of(type) == 2   ? apply<u16, u16>([](u16 a) { return ~a; })
           : bytes_of(type) == 4 ? apply<u32, u32>([](u32 a) { return ~a; })
                                 : apply<u64, u64>([](u64 a) { return ~a; });
  }
  if (type == Type::f16x2 && op == "neg") return apply<u32, u32>([](u32 a) { return a ^ 0x80008000u; });
  if (op == "neg") return unary(type, [](auto a) { return -a; });
  if (op == "abs") return unary(type, [](auto a) { return a < 0 ? -a : a == 0 ? decltype(a)(0) : a; });
  if (op == "mul" && type == Type::f32) return apply<float, float, float>([](float a, float b) { return a * b; });
  if (op == "mul" && type == Type::f64) return apply<double, double, double>([](double a, double b) { return a * b; });
  if (op == "div" && is_float(type)) {
    if (!statement.has("rn")) return nullptr;
    return type == Type::f32 ? apply<float, float, float>([](float a, float b) { return a / b; })
                             : apply<double, double, double>([](double a, double b) { return a / b; });
  }
  // An integer's division by zero is undefined: all ones here.
  if (op == "div")
    return arithmetic(type, [](auto a, auto b) { return b == 0 ? decltype(a)(-1) : decltype(a)(a / b); });
  if (op == "rem" && !is_float(type)) {
    switch (type) {
      case Type::u32:
        return apply<u32, u32, u32>([](u32 a, u32 b) { return b == 0 ? ~0u : a % b; });
      case Type::s32:
        return apply<s32, s32, s32>([](s32 a, s32 b) { return b == 0 ? -1 : a % b; });
      case Type::u64:
        return apply<u64, u64, u64>([](u64 a, u64 b) { return b == 0 ? ~0ull : a % b; });
      case Type::s64:
        return apply<s64, s64, s64>([](s64 a, s64 b) { return b == 0 ? -1ll : a % b; });
      default:
        return nullptr;
    }
  }
  if (op == "fma" && type == Type::f32)
    return apply<float, float, float, float>([](float a, float b, float c) { return std::fma(a, b, c); });
  if (op == "fma" && type == Type::f64)
    return apply<double, double, double, double>([](double a, double b, double c) { return std::fma(a, b, c); });
  if (type == Type::f16x2) return in_halves(op);
  if (op == "copysign" && type == Type::f32)  // the sign comes first
    return apply<float, float, float>([](float sign, float x) { return std::copysign(x, sign); });
  if (op == "prmt") return apply<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return permuted(a, b, c); });
  if (op == "clz" && bytes_of(type) == 4) return apply<u32, u32>([](u32 x) { return x == 0 ? 32 : __builtin_clz(x); });
  if (op == "popc" && bytes_of(type) == 4) return apply<u32, u32>([](u32 x) { return __builtin_popcount(x); });
  if (op == "ex2" && type == Type::f32) {
    return statement.has("ftz") ? apply<float, float>([](float x) { return flushed(std::exp2(flushed(x))); })
                                : apply<float, float>([](float x) { return std::exp2(x); });
  }
  if (op == "sin" && type == Type::f32)
    return apply<float, float>([](float x) { return static_cast<float>(std::sin(static_cast<double>(flushed(x)))); });
  if (op == "cos" && type == Type::f32)
    return apply<float, float>([](float x) { return static_cast<float>(std::cos(static_cast<double>(flushed(x)))); });
  if (op == "rcp" && type == Type::f32 && statement.has("rn"))
    return apply<float, float>([](float x) { return 1.0f / x; });
  if (op == "rcp" && type == Type::f32)
    return apply<float, float>([](float x) { return flushed(1.0f / flushed(x)); });
  if (op == "sqrt" && type == Type::f32 && statement.has("rn"))
    return apply<float, float>([](float x) { return std::sqrt(x); });
  if (op == "rsqrt" && type == Type::f32)
    return apply<float, float>(
        [](float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(flushed(x)))); });
  return nullptr;
}

Handler shift(Type type, bool left) {
  const int bytes = bytes_of(type);
  // Shifts by more than the width clear the number, or fill it with its sign.
  if (left) {
    return bytes == 2   ? apply<u16, u16, u32>([](u16 a, u32 n) { return n > 15 ? 0 : a << n; })
           : bytes == 4 ? apply<u32, u32, u32>([](u32 a, u32 n) { return n > 31 ? 0u : a << n; })
                        : apply<u64, u64, u32>([](u64 a, u32 n) { return n > 63 ? 0ull : a << n; });
  } else if (is_signed(type)) {
    return bytes == 2   ? apply<s16, s16, u32>([](s16 a, u32 n) { return a >> std::min(n, 15u); })
           : bytes == 4 ? apply<s32, s32, u32>([](s32 a, u32 n) { return a >> std::min(n, 31u); })
                        : apply<s64, s64, u32>([](s64 a, u32 n) { return a >> std::min(n, 63u); });
  } else {
    return bytes == 2   ? apply<u16, u16, u32>([](u16 a, u32 n) { return n > 15 ? 0 : a >> n; })
           : bytes == 4 ? apply<u32, u32, u32>([](u32 a, u32 n) { return n > 31 ? 0u : a >> n; })
                        : apply<u64, u64, u32>([](u64 a, u32 n) { return n > 63 ? 0ull : a >> n; });
  }
}

Handler product(const Statement& statement, Type type) {
  const int bytes = bytes_of(type);
  if (statement.has("wide")) {
    switch (type) {
      case Type::u16:
        return apply<u32, u16, u16, u32>([](u16 a, u16 b, u32 c) { return static_cast<u32>(a) * b + c; });
      case Type::s16:
        return apply<s32, s16, s16, s32>([](s16 a, s16 b, s32 c) { return a * b + c; });
      case Type::u32:
        return apply<u64, u32, u32, u64>([](u32 a, u32 b, u64 c) { return static_cast<u64>(a) * b + c; });
      case Type::s32:
        return apply<s64, s32, s32, s64>([](s32 a, s32 b, s64 c) { return static_cast<s64>(a) * b + c; });
      default:
        return nullptr;
    }
  } else if (statement.has("lo")) {
    auto product = [](auto a, auto b, auto c) { return a * b + c; };
    return bytes == 2   ? apply<u16, u16, u16, u16>(product)
           : bytes == 4 ? apply<u32, u32, u32, u32>(product)
                        : apply<u64, u64, u64, u64>(product);
  } else if (statement.has("hi") && bytes == 4) {
    return is_signed(type) ? apply<s32, s32, s32, s32>([](s32 a, s32 b, s32 c) {
      return static_cast<s32>(static_cast<s64>(a) * b >> 32) + c;
    })
                           : apply<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) {
                               return static_cast<u32>(static_cast<u64>(a) * b >> 32) + c;
                             });
  }
  return nullptr;
}

Handler bit_field(Type type, bool inserts) {
  const int bytes = bytes_of(type);
  if (inserts) {
    return bytes == 4 ? apply<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 p, u32 n) { return inserted(a, b, p, n); })
                      : apply<u64, u64, u64, u32, u32>([](u64 a, u64 b, u32 p, u32 n) { return inserted(a, b, p, n); });
  } else if (is_signed(type)) {
    return bytes == 4 ? apply<u32, u32, u32, u32>([](u32 a, u32 p, u32 n) { return extracted(a, p, n, true); })
                      : apply<u64, u64, u32, u32>([](u64 a, u32 p, u32 n) { return extracted(a, p, n, true); });
  } else {
    return bytes == 4 ? apply<u32, u32, u32, u32>([](u32 a, u32 p, u32 n) { return extracted(a, p, n, false); })
                      : apply<u64, u64, u32, u32>([](u64 a, u32 p, u32 n) { return extracted(a, p, n, false); });
  }
}

Handler lookup_of_three() { return table_of_three; }

Handler selection(Type type) {
  const int bytes = bytes_of(type);
  return bytes == 2 ? select<u16> : bytes == 4 ? select<u32> : select<u64>;
}

Handler logic(const std::string& name) {
  auto of = [](auto f) -> Handler { return &predicates<decltype(f)>; };
  if (name == "and") return of([](u32 a, u32 b) { return a & b; });
  if (name == "or") return of([](u32 a, u32 b) { return a | b; });
  if (name == "xor") return of([](u32 a, u32 b) { return a ^ b; });
  if (name == "not") return of([](u32 a, u32) { return ~a; });
  if (name == "mov") return of([](u32 a, u32) { return a; });
  return nullptr;
}

}  // namespace emulator
