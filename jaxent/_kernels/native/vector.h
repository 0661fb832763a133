// Vectors of floats as wide as the instruction set, by the vector types that GCC and clang share, and what the row
// functions need of them: conversions, exp, log.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "rows.h"

#if defined(__AVX512F__)
#define JAXENT_BYTES 64
#elif defined(__AVX2__)
#define JAXENT_BYTES 32
#else
#define JAXENT_BYTES 16
#endif

namespace {  // each instruction set has its own copy of everything

constexpr int W = JAXENT_BYTES / 4;  // lanes
using V = float __attribute__((vector_size(JAXENT_BYTES)));
using I = int32_t __attribute__((vector_size(JAXENT_BYTES)));
using U = uint32_t __attribute__((vector_size(JAXENT_BYTES)));
using H = uint16_t __attribute__((vector_size(JAXENT_BYTES / 2)));

constexpr float kLowest = -3.40282347e38f;  // of all finite floats

inline V all(float x) { return x - V{}; }
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline I bits(V v) { return (I)v; }
inline V from_bits(I i) { return (V)i; }

inline I iota() {
  I i;
  for (int k = 0; k < W; k++) i[k] = k;
  return i;
}

// NaN in x is passed over: sums of exponentials report it.
inline V larger(V x, V m) { return x > m ? x : m; }

// exp(x) for x <= 0 with 1 ulp; 0 below the smallest normal number, whatever the processor does with subnormal ones.
inline V exp(V x) {
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23 leaves the integer in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
  V q = all(1.38145e-3f);
  q = q * r + 8.36875e-3f;
  q = q * r + 4.166839e-2f;
  q = q * r + 1.666652e-1f;
  q = q * r + 4.9999993e-1f;
  const V e = q * (r * r) + r + 1.0f;
  const V scale = from_bits((I)(((U)bits(shifted) << 23) + 0x3f800000));
  return x < -87.33654f ? V{} : e * scale;  // e is NaN where x is, and stays so
}

// log(x) + missing / x for x >= 1, where what x lost when it was rounded is missing. Polynomial: fdlibm's e_logf.c.
inline V log(V x, V missing) {
  const I offset = bits(x) - 0x3f3504f3;  // from sqrt(1/2)
  const V n = __builtin_convertvector(offset >> 23, V);
  const V f = from_bits((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const V s = f / (f + 2.0f), z = s * s, w = z * z;
  const V r = z * (w * 0.28498787f + 0.66666662f) + w * (w * 0.24279079f + 0.40000972f);
  const V half = 0.5f * f * f;
  const V y = n * 0.693138123f - ((half - (s * (half + r) + n * 9.05800094e-6f)) - f) + missing / x;
  return x < __builtin_inff() ? y : x;
}

// The lanes of two vectors in turns: of their first halves, and of their second halves.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define JAXENT_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif
#ifndef JAXENT_SHUFFLE  // GCC before 12
#define JAXENT_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, I{__VA_ARGS__})
#endif
template <size_t... K>
inline V interleave_first(V x, V y, std::index_sequence<K...>) {
  return JAXENT_SHUFFLE(x, y, (int)(K % 2 * W + K / 2)...);
}
template <size_t... K>
inline V interleave_second(V x, V y, std::index_sequence<K...>) {
  return JAXENT_SHUFFLE(x, y, (int)(K % 2 * W + (W + K) / 2)...);
}
inline V interleave_first(V x, V y) { return interleave_first(x, y, std::make_index_sequence<W>{}); }
inline V interleave_second(V x, V y) { return interleave_second(x, y, std::make_index_sequence<W>{}); }

// Lane k of the result is made of all lanes of rows[k]: W rows are added up, or compared, by three operations each.
template <class Join>
inline V reduce_each(V (&rows)[W], Join join) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++)
      rows[k] = join(interleave_first(rows[k], rows[k + half]), interleave_second(rows[k], rows[k + half]));
  return rows[0];
}

// Lane j of row k becomes lane k of row j.
inline void transpose(V (&rows)[W]) {
  for (int step = 1; step < W; step *= 2) {
    V next[W];
    for (int k = 0; k < W / 2; k++) {
      next[2 * k] = interleave_first(rows[k], rows[k + W / 2]);
      next[2 * k + 1] = interleave_second(rows[k], rows[k + W / 2]);
    }
    std::memcpy(rows, next, sizeof rows);
  }
}

// Formats of half the width. All arithmetic is on floats.
using jaxent::Type;

inline V widen_bf16(H h) { return from_bits((I)(__builtin_convertvector(h, U) << 16)); }

inline H narrow_bf16(V v) {
  const U u = (U)bits(v), even = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __builtin_convertvector(v == v ? even : U{} + 0x7fc0, H);
}

inline V widen_f16(H h) {
  const U u = __builtin_convertvector(h, U), magnitude = u & 0x7fff;
  const V small = __builtin_convertvector((I)magnitude, V) * 5.9604645e-8f;  // 2**-24 each
  const U exponent = magnitude >= 0x7c00 ? U{} + (255u - 31u) : U{} + (127u - 15u);
  const I large = (I)((magnitude << 13) + (exponent << 23));
  return from_bits(bits(magnitude < 0x400 ? small : from_bits(large)) | (I)((u & 0x8000) << 16));
}

inline H narrow_f16(V v) {
  const U u = (U)bits(v), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  const U small = (U)bits(from_bits((I)magnitude) + 0.5f) - 0x3f000000;  // 0.5 counts in units of 2**-24, and rounds
  const U normal = (magnitude - ((127u - 15u) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const U finite = magnitude < 0x38800000 ? small : normal;
  const U other = magnitude > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
  return __builtin_convertvector(sign | (magnitude < 0x477ff000 ? finite : other), H);
}

inline H load_half(const void* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return h;
}
inline void store_half(void* p, H h) { std::memcpy(p, &h, sizeof h); }

inline V load_as_float(const char* p, Type type) {
  if (type == Type::f32) return load((const float*)p);
  return type == Type::bf16 ? widen_bf16(load_half(p)) : widen_f16(load_half(p));
}
inline void store_from_float(char* p, Type type, V v) {
  if (type == Type::f32) return store((float*)p, v);
  store_half(p, type == Type::bf16 ? narrow_bf16(v) : narrow_f16(v));
}

constexpr int size_of(Type type) { return type == Type::f32 ? 4 : 2; }

template <Type type>
inline void widen(const char* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load_as_float(from + i * size_of(type), type));
  if (i == n) return;
  char rest[4 * W] = {};
  float wide[W];
  std::memcpy(rest, from + i * size_of(type), (n - i) * size_of(type));
  store(wide, load_as_float(rest, type));
  std::memcpy(to + i, wide, (n - i) * sizeof(float));
}

template <Type type>
inline void narrow(const float* from, char* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_from_float(to + i * size_of(type), type, load(from + i));
  if (i == n) return;
  char rest[4 * W];
  float wide[W] = {};
  std::memcpy(wide, from + i, (n - i) * sizeof(float));
  store_from_float(rest, type, load(wide));
  std::memcpy(to + i * size_of(type), rest, (n - i) * size_of(type));
}

// n numbers of some type from memory as floats, and back.
inline void widen(Type type, const char* from, float* to, int64_t n) {
  if (type == Type::f32) std::memcpy(to, from, n * sizeof(float));
  if (type == Type::bf16) widen<Type::bf16>(from, to, n);
  if (type == Type::f16) widen<Type::f16>(from, to, n);
}
inline void narrow(Type type, const float* from, char* to, int64_t n) {
  if (type == Type::f32) std::memcpy(to, from, n * sizeof(float));
  if (type == Type::bf16) narrow<Type::bf16>(from, to, n);
  if (type == Type::f16) narrow<Type::f16>(from, to, n);
}

}  // namespace
