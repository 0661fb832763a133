// The row functions, for the instruction set that this file is compiled for.
//
// A row is read once from memory: a block of it that fits the first-level cache is compared with the largest logit so
// far, what has been added up is made relative to the new largest, and the block is added. What a lane of a vector
// adds up is either of classes k, k + W, ... of one row, and lanes are joined at its end, or of a row of its own.
// Functions with a result of the logits' size read the row once more, from the second-level cache, and write.
#include "rows.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <type_traits>

#include "vector.h"

namespace {

using jaxent::Call;
using jaxent::Function;
using jaxent::Threads;

constexpr bool is_derivative(Function f) {
  return f == Function::softmax_derivative || f == Function::log_softmax_derivative;
}
constexpr bool is_label(Function f) {
  return f == Function::label_loss || f == Function::label_loss_and_gradient || f == Function::own_label_loss ||
         f == Function::own_label_loss_and_gradient;
}
constexpr bool is_expected(Function f) {
  return f == Function::expected_loss || f == Function::expected_loss_and_gradient;
}
constexpr bool has_tangents(Function f) {
  return is_derivative(f) || f == Function::log_softmax_pullback || is_expected(f);
}
constexpr bool has_gaps(Function f) {
  return f == Function::label_loss || f == Function::label_loss_and_gradient || is_expected(f);
}
constexpr bool writes(Function f) {
  return f != Function::label_loss && f != Function::own_label_loss && f != Function::expected_loss;
}

// What has been added up. The largest logits, for which exp(x - m) is 1, are counted instead: many small terms beside
// them would be rounded away.
struct State {
  V m = all(kLowest);  // the largest logit
  V ties = {};         // how often it occurs; of a label's loss without the label
  V others = {};       // of exp(x - m) of the others; of a label's loss without the label
  V at_largest = {};   // of t of the largest
  V at_others = {};    // of t of the others, for derivatives times exp(x - m)
  V gaps = {};         // of t * (m - x)
};

using Sum = V State::*;
constexpr Sum kSums[] = {&State::ties, &State::others, &State::at_largest, &State::at_others, &State::gaps};

inline void merge(State& s, const State& more) {
  for (const Sum sum : kSums) s.*sum += more.*sum;
}

// Make sums relative to a logit that is at least as large as all so far.
template <Function f>
inline void raise(State& s, V m) {
  const I rose = m > s.m;
  const V r = exp(s.m - m);
  if constexpr (has_gaps(f)) {
    const V mass = s.at_largest + s.at_others;
    s.gaps += mass == 0.0f ? V{} : mass * (m - s.m);
  }
  s.others = (s.others + (rose ? s.ties : V{})) * r;
  s.ties = rose ? V{} : s.ties;
  if constexpr (has_tangents(f)) {
    s.at_others += rose ? s.at_largest : V{};
    s.at_largest = rose ? V{} : s.at_largest;
  }
  if constexpr (is_derivative(f)) s.at_others *= r;
  s.m = m;
}

// Returns exp(x - m).
template <Function f, bool excluding = false>
inline V add(State& s, V x, V t, I excluded) {
  const V d = x - s.m, e = exp(d);
  const I largest = x == s.m;
  const I apart = excluding && is_label(f) ? largest | excluded : largest;
  const I tie = excluding && is_label(f) ? largest & ~excluded : largest;
  s.ties = tie ? s.ties + 1.0f : s.ties;
  s.others = apart ? s.others : s.others + e;
  if constexpr (has_tangents(f)) {
    s.at_largest = largest ? s.at_largest + t : s.at_largest;
    s.at_others = largest ? s.at_others : s.at_others + (is_derivative(f) ? e * t : t);
  }
  if constexpr (has_gaps(f) && is_label(f)) s.at_others += t;  // of all classes, whose number is the mass
  if constexpr (has_gaps(f)) s.gaps -= t == 0.0f ? V{} : t * d;
  return e;
}

// What `finish` wants to know.
template <Function f>
constexpr bool is_wanted(Sum sum) {
  if (sum == &State::gaps) return has_gaps(f);
  if (sum == &State::at_largest || sum == &State::at_others) return has_tangents(f);
  return true;
}

// A lane for each of W rows, from what the lanes of each row have added up relative to the same logit.
template <Function f>
class Joined {
 public:
  void put(int k, const State& s) {
    for (int i = 0; i < kCount; i++)
      if (is_wanted<f>(kSums[i])) lanes_[i][k] = s.*kSums[i];
  }
  State join(V m) {
    State s;
    s.m = m;
    for (int i = 0; i < kCount; i++)
      if (is_wanted<f>(kSums[i])) s.*kSums[i] = reduce_each(lanes_[i], [](V a, V b) { return a + b; });
    return s;
  }

 private:
  static constexpr int kCount = std::size(kSums);
  V lanes_[kCount][W];
};

inline V largest_of_each(V (&lanes)[W]) {
  return reduce_each(lanes, [](V a, V b) { return larger(a, b); });
}

// What an entry of the result is made of, beside its logit and t.
struct Coefficients {
  V m, a, b, c, threshold;
  V at_label;
  I none;  // rows that are 0 whatever they hold
};

inline Coefficients row(const Coefficients& rows, int k) {
  return {all(rows.m[k]), all(rows.a[k]),        all(rows.b[k]),        all(rows.c[k]),
          all(rows.threshold[k]), all(rows.at_label[k]), I{} + rows.none[k]};
}

// What is known of up to W rows beside their logits.
struct Row {
  I largest = {};  // the first class of the largest logit, where it is wanted
  I label;
  V of_label;  // its logit; NaN if there is no such class
  V factors[3] = {};
  V results[3];
};

// A sum of exponentials, or NaN where a logit is inf, and where all of them are -inf.
inline V known(V m, V total) {
  const I nothing = (m == __builtin_inff()) | (total == 0.0f);
  return nothing ? all(__builtin_nanf("")) : total;
}

template <Function f>
inline Coefficients finish(const State& s, Row& rows, float classes) {
  const V nan = all(__builtin_nanf(""));
  Coefficients c;
  c.m = s.m;
  c.none = I{};
  if constexpr (is_label(f)) {
    const V gap = rows.of_label - s.m, of_label = exp(gap), others = s.ties + s.others;
    const V total = known(s.m, others + of_label);
    const V log_total = log(total, gap == 0.0f ? others - (total - 1.0f) : V{});
    const V loss = log_total - gap, lse = s.m + log_total;
    c.none = rows.label < 0;
    rows.results[0] = c.none ? V{} : total == total ? loss : nan;
    if constexpr (has_gaps(f)) rows.results[1] = c.none ? V{} : total == total ? log_total + s.gaps / classes : nan;
    rows.results[2] = c.none ? V{} : total == total ? lse : nan;
    if constexpr (!writes(f)) return c;
    const V a = rows.factors[0], u = rows.factors[1], z = rows.factors[2], shared = u + 2.0f * z * lse;
    c.none |= (a == 0.0f) & (u == 0.0f) & (z == 0.0f);
    c.a = (a + shared) / total;
    c.b = u / classes;
    c.at_label = c.none ? V{} : (shared * of_label - a * others) / total - c.b;
    return c;
  }
  const V total = known(s.m, s.ties + s.others);
  const V mass = s.at_largest + s.at_others;
  const I dominated = total < 1.5f;  // one class has two thirds of the probability
  const auto log_total = [&] {
    const V one_more = 1.0f + s.others;
    return log(dominated ? one_more : total, dominated ? s.others - (one_more - 1.0f) : V{});
  };
  c.threshold = dominated ? all(0.75f) : all(2.0f);
  c.a = 1.0f / total;
  if constexpr (f == Function::log_softmax) c.a = log_total();
  if constexpr (is_derivative(f)) {
    c.b = dominated ? s.at_largest : V{};
    c.c = (dominated ? s.at_others - s.others * s.at_largest : mass) / total;
  }
  if constexpr (f == Function::log_softmax_pullback) {
    c.a = mass / total;
    c.b = (s.at_largest * s.others - s.at_others) / total;
  }
  if constexpr (is_expected(f)) {
    const V log_mass = log_total();
    const bool none = classes == 0.0f;
    rows.results[0] = none ? V{} : s.gaps + mass * log_mass;
    rows.results[1] = none ? all(-__builtin_inff()) : s.m + log_mass;
    if constexpr (!writes(f)) return c;
    c.a = mass / total;
    c.b = s.at_others - mass * s.others / total;
    c.c = rows.factors[0];
    c.none = c.c == 0.0f;
  }
  return c;
}

// From exp(x - m), but for log_softmax from x.
template <Function f>
inline V entry(V e, V t, const Coefficients& c) {
  if constexpr (f == Function::log_softmax) return e - c.m - c.a;
  if constexpr (f == Function::softmax) return e * c.a;
  if constexpr (f == Function::softmax_derivative) return e * c.a * ((e > c.threshold ? V{} : t - c.b) - c.c);
  if constexpr (f == Function::log_softmax_derivative) return (e > c.threshold ? V{} : t - c.b) - c.c;
  if constexpr (f == Function::log_softmax_pullback) return e > c.threshold ? c.b : t - e * c.a;
  if constexpr (is_label(f)) return e * c.a - c.b;
  if constexpr (is_expected(f)) return c.c * (e > c.threshold ? c.b : e * c.a - t);
}

// While entries are computed, others are fetched that come next, a line at each step: processors that see a pattern
// in what is read do not follow it into the next page. No memory is touched, so that they may lie behind the end.
template <Function f>
class Ahead {
 public:
  // Of the logits and what belongs to them from entry `read` on, and of the result from `written` on.
  Ahead(const Call& call, int64_t read, int64_t written)
      : x_((uintptr_t)call.x + read * size_of(call.x_type)),
        t_((uintptr_t)call.t + read * size_of(call.t_type)),
        out_((uintptr_t)call.out + written * size_of(call.out_type)),
        x_size_(size_of(call.x_type)),
        t_size_(size_of(call.t_type)),
        out_size_(size_of(call.out_type)) {}

  void fetch_read(int64_t i) const {
    __builtin_prefetch((const void*)(x_ + i * x_size_));
    if constexpr (has_tangents(f)) __builtin_prefetch((const void*)(t_ + i * t_size_));
  }
  void fetch_written(int64_t i) const {
    if constexpr (writes(f)) __builtin_prefetch((const void*)(out_ + i * out_size_), 1);
  }

 private:
  const uintptr_t x_, t_, out_;
  const int64_t x_size_, t_size_, out_size_;
};

// Classes along the lanes. They lie side by side and are at least W.

constexpr int64_t kRun = 16 * W;  // few enough to be added one after the other
constexpr int64_t kBlock = 1024;  // floats in a first-level cache

// Add vectors at `begin`, `begin` + W, ... below `end`, each run of them apart, as a sum of many loses to rounding.
template <typename AddTo>
inline void in_runs(State& s, int64_t begin, int64_t end, const AddTo& add_to) {
  for (; begin < end; begin += kRun) {
    State run;
    run.m = s.m;
    for (int64_t i = begin; i < std::min(end, begin + kRun); i += W) add_to(run, i);
    merge(s, run);
  }
}

// All vectors below `whole`. `add_to` is told whether the label may be among them, which only one run has to look for.
template <typename AddTo>
inline void in_all_runs(State& s, int64_t whole, int64_t label, const AddTo& add_to) {
  const bool any = 0 <= label && label < whole;
  const int64_t begin = any ? label / kRun * kRun : 0, end = any ? std::min(whole, begin + kRun) : 0;
  const auto adding = [&](auto looks) { return [&](State& run, int64_t i) { add_to(run, i, looks); }; };
  in_runs(s, 0, begin, adding(std::false_type()));
  in_runs(s, begin, end, adding(std::true_type()));
  in_runs(s, end, whole, adding(std::false_type()));
}

// The next block of a row that ends at `end`: none is shorter than a vector.
inline int64_t block(int64_t start, int64_t end) { return end - start <= 2 * kBlock ? end - start : kBlock; }

inline const float* floats(const char* p, Type type, int64_t offset, int64_t n, float* scratch) {
  p += offset * size_of(type);
  if (type == Type::f32) return (const float*)p;
  widen(type, p, scratch, n);
  return scratch;
}

template <Function f>
void accumulate_block(State& s, const float* x, const float* t, int64_t n, int64_t label, const Ahead<f>& ahead) {
  const int64_t whole = n - n % W;
  const I rest = iota() >= (int)(W - n % W);  // of the last vector, which overlaps the one before
  const V minus_infinity = all(-__builtin_inff());
  const V last = whole < n ? (rest ? load(x + n - W) : minus_infinity) : minus_infinity;
  V m = larger(last, s.m), m1 = m, m2 = m, m3 = m;
  int64_t i = 0;
  for (; i + 4 * W <= whole; i += 4 * W) {
    m = larger(load(x + i), m);
    m1 = larger(load(x + i + W), m1);
    m2 = larger(load(x + i + 2 * W), m2);
    m3 = larger(load(x + i + 3 * W), m3);
  }
  for (; i < whole; i += W) m = larger(load(x + i), m);
  State b;
  b.m = larger(larger(m, m1), larger(m2, m3));
  raise<f>(s, b.m);

  const auto tangent = [&](int64_t i) { return is_label(f) ? all(1.0f) : has_tangents(f) ? load(t + i) : V{}; };
  const auto is_label_at = [&](int64_t i) {  // which a row of 2**32 classes and more does not make an int
    return is_label(f) ? iota() == (int)std::clamp<int64_t>(label - i, -1, W) : I{};
  };
  in_all_runs(b, whole, label, [&](State& run, int64_t i, auto looks) {
    ahead.fetch_read(i);
    add<f, looks>(run, load(x + i), tangent(i), is_label_at(i));
  });
  if (whole < n) add<f, true>(b, last, rest ? tangent(n - W) : V{}, is_label_at(n - W));
  merge(s, b);
}

// The first of n entries that is m, or 0. Not inlined: the loops of all who do not ask would be a tenth slower.
[[gnu::noinline]] int find(const float* x, int64_t n, float m) {
  const int none = (int)n;
  I at = I{} + none;
  for (int64_t i = n - n % W; i < n; i++)
    if (x[i] == m) at[0] = std::min(at[0], (int)i);
  for (int64_t i = n - n % W - W; i >= 0; i -= W) at = load(x + i) == m ? iota() + (int)i : at;
  int first = none;
  for (int k = 0; k < W; k++) first = std::min<int>(first, at[k]);
  return first < none ? first : 0;
}

// The largest logit so far, and the first class that has it.
struct Largest {
  float m = kLowest;
  int64_t at = 0;

  void look(V lanes, const float* x, int64_t n, int64_t start) {
    float now = m;
    for (int k = 0; k < W; k++) now = std::max<float>(now, lanes[k]);
    if (now > m) m = now, at = start + find(x, n, now);
  }
};

template <Function f>
State accumulate(const Call& call, int64_t row, int64_t begin, int64_t end, Largest& largest) {
  float x[2 * kBlock], t[2 * kBlock];
  State s;
  const int64_t label = is_label(f) ? call.label[row] : -1;
  for (int64_t start = begin, n; start < end; start += n) {
    n = block(start, end);
    const int64_t offset = row * call.classes + start;
    const float* xs = floats(call.x, call.x_type, offset, n, x);
    const float* ts = has_tangents(f) ? floats(call.t, call.t_type, offset, n, t) : nullptr;
    accumulate_block<f>(s, xs, ts, n, label - start, Ahead<f>(call, offset + n, 0));
    if (call.largest) largest.look(s.m, xs, n, start);
  }
  return s;
}

template <Function f>
void write_block(const float* x, const float* t, float* out, int64_t n, const Coefficients& c, const Ahead<f>& ahead) {
  const auto at = [&](int64_t i) {
    const V e = f == Function::log_softmax ? load(x + i) : exp(load(x + i) - c.m);
    return entry<f>(e, has_tangents(f) ? load(t + i) : V{}, c);
  };
  const int64_t whole = n - n % W;
  const V last = whole < n ? at(n - W) : V{};  // before its first entries may be overwritten
  for (int64_t i = 0; i < whole; i += W) {
    ahead.fetch_written(i);
    store(out + i, at(i));
  }
  if (whole < n) store(out + n - W, last);
}

template <Function f>
void write(const Call& call, int64_t row, int64_t begin, int64_t end, const Coefficients& c) {
  float x[2 * kBlock], t[2 * kBlock], scratch[2 * kBlock];
  for (int64_t start = begin, n; start < end; start += n) {
    n = block(start, end);
    const int64_t offset = row * call.classes + start;
    char* to = call.out + offset * size_of(call.out_type);
    float* out = call.out_type == Type::f32 ? (float*)to : scratch;
    const float* tangents = has_tangents(f) ? floats(call.t, call.t_type, offset, n, t) : nullptr;
    if (c.none[0])
      std::fill(out, out + n, 0.0f);
    else
      write_block<f>(floats(call.x, call.x_type, offset, n, x), tangents, out, n, c, Ahead<f>(call, 0, offset + n));
    if constexpr (is_label(f)) {
      const int64_t label = call.label[row] - start;
      if (0 <= label && label < n) out[label] = c.at_label[0];
    }
    if (out == scratch) narrow(call.out_type, scratch, to, n);
  }
}

inline float number(const char* p, Type type, int64_t offset) {
  float x;
  p += offset * size_of(type);
  if (type == Type::f32) {
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p, sizeof h);
  return type == Type::bf16 ? widen_bf16(H{} + h)[0] : widen_f16(H{} + h)[0];
}

// Where class `start` of row `first` is.
inline int64_t offset_of(const Call& call, int64_t first, int64_t start) {
  return (first / call.inner * call.classes + start) * call.inner + first % call.inner;
}

template <class Vector, class T>
inline Vector load_some(const T* p, int64_t n) {
  Vector v = {};
  if (n == W)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, n * sizeof(T));
  return v;
}

// Of rows `first` and the n - 1 that follow, but for the logits of their labels.
template <Function f>
inline Row read_rows(const Call& call, int64_t first, int64_t n) {
  Row rows;
  if constexpr (is_label(f)) rows.label = load_some<I>(call.label + first, n), rows.of_label = all(__builtin_nanf(""));
  for (int j = 0; j < 3; j++)
    if (call.factors[j]) rows.factors[j] = load_some<V>(call.factors[j] + first, n);
  return rows;
}

inline void write_rows(const Call& call, int64_t first, int64_t n, const Row& rows) {
  for (int j = 0; j < 3; j++)
    if (call.rows[j] && n == W)
      store(call.rows[j] + first, rows.results[j]);
    else if (call.rows[j])
      std::memcpy(call.rows[j] + first, &rows.results[j], n * sizeof(float));
}

// Rows `first` and the n - 1 that follow, at most W, whose sums are in the lanes of `s`.
template <Function f>
Coefficients finish_rows(const Call& call, const State& s, int64_t first, int64_t n) {
  Row rows = read_rows<f>(call, first, n);
  if constexpr (is_label(f)) {
    float of_label[W] = {};
    for (int64_t k = 0; k < n; k++) {
      const int32_t y = call.label[first + k];
      const bool known = 0 <= y && y < call.classes;
      of_label[k] = known ? number(call.x, call.x_type, (first + k) * call.classes + y) : __builtin_nanf("");
    }
    rows.of_label = load(of_label);
  }
  const Coefficients c = finish<f>(s, rows, (float)call.classes);
  write_rows(call, first, n, rows);
  return c;
}

template <Function f>
Coefficients finish_long(const Call& call, State s, int64_t r) {
  V lanes[W];
  std::fill(lanes, lanes + W, s.m);
  raise<f>(s, all(largest_of_each(lanes)[0]));
  Joined<f> rows;
  for (int k = 0; k < W; k++) rows.put(k, s);
  const Coefficients c = finish_rows<f>(call, rows.join(s.m), r, 1);
  if constexpr (!writes(f)) return c;
  return row(c, 0);
}

template <Function f>
void along(const Call& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    Largest largest;
    const State s = accumulate<f>(call, r, 0, call.classes, largest);
    if (call.largest) call.largest[r] = (int32_t)largest.at;
    const Coefficients c = finish_long<f>(call, s, r);
    if constexpr (writes(f)) write<f>(call, r, 0, call.classes, c);
  }
}

// Rows of which several fit the first-level cache: up to W of them are joined at once, and exponentials are kept until
// they are written.
constexpr int64_t kShort = 2 * kBlock;
constexpr int64_t kTogether = 8 * kBlock;

template <Function f>
void along_short(const Call& call, int64_t begin, int64_t end) {
  alignas(64) float x_scratch[kTogether], t_scratch[kTogether], e[kTogether];
  const int64_t classes = call.classes, whole = classes - classes % W;
  const int64_t group = std::min<int64_t>(kTogether / classes, W);
  const I rest = iota() >= (int)(W - classes % W);  // of the last vector, which overlaps the one before
  for (int64_t first = begin; first < end; first += group) {
    const int64_t n = std::min(group, end - first);
    const float* xs = floats(call.x, call.x_type, first * classes, n * classes, x_scratch);
    const float* ts = has_tangents(f) ? floats(call.t, call.t_type, first * classes, n * classes, t_scratch) : xs;
    V lanes[W] = {};
    for (int64_t k = 0; k < n; k++) {
      const float* x = xs + k * classes;
      V m = larger(load(x + classes - W), all(kLowest));
      for (int64_t i = 0; i < whole; i += W) m = larger(load(x + i), m);
      lanes[k] = m;
    }
    const V m = largest_of_each(lanes);
    if (call.largest)
      for (int64_t k = 0; k < n; k++) call.largest[first + k] = find(xs + k * classes, classes, m[k]);
    Joined<f> rows;
    for (int64_t k = 0; k < n; k++) {
      const float *x = xs + k * classes, *t = ts + k * classes;
      const auto tangent = [&](int64_t i) { return is_label(f) ? all(1.0f) : has_tangents(f) ? load(t + i) : V{}; };
      const Ahead<f> ahead(call, (first + group + k) * classes, (first + k) * classes);
      const int64_t label = is_label(f) ? call.label[first + k] : -1;
      const auto is_label_at = [&](int64_t i) { return is_label(f) ? iota() == (int)(label - i) : I{}; };
      State s;
      s.m = all(m[k]);
      in_all_runs(s, whole, label, [&](State& run, int64_t i, auto looks) {
        ahead.fetch_read(i);
        ahead.fetch_written(i);
        const V ex = add<f, looks>(run, load(x + i), tangent(i), is_label_at(i));
        if (writes(f) && f != Function::log_softmax) store(e + k * classes + i, ex);
      });
      if (whole < classes) {
        const int64_t i = classes - W;
        const V last = load(x + i);
        const V ex =
            add<f, true>(s, rest ? last : all(-__builtin_inff()), rest ? tangent(i) : V{}, is_label_at(i));
        if (writes(f) && f != Function::log_softmax) {
          float* to = e + k * classes + i;
          store(to, rest ? ex : load(to));
        }
      }
      rows.put((int)k, s);
    }
    for (int64_t k = n; k < W; k++) rows.put((int)k, State{});
    const Coefficients c = finish_rows<f>(call, rows.join(m), first, n);
    if constexpr (!writes(f)) continue;
    char* to = call.out + first * classes * size_of(call.out_type);
    float* outs = call.out_type == Type::f32 ? (float*)to : x_scratch;
    for (int64_t k = 0; k < n; k++) {
      const Coefficients one = row(c, (int)k);
      const float *from = (f == Function::log_softmax ? xs : e) + k * classes, *t = ts + k * classes;
      float* out = outs + k * classes;
      if (c.none[k]) {
        std::fill(out, out + classes, 0.0f);
        continue;
      }
      const auto at = [&](int64_t i) { return entry<f>(load(from + i), has_tangents(f) ? load(t + i) : V{}, one); };
      const V last = at(classes - W);  // before its first entries may be overwritten
      for (int64_t i = 0; i < whole; i += W) store(out + i, at(i));
      store(out + classes - W, last);
      if constexpr (is_label(f)) {
        const int32_t y = call.label[first + k];
        if (y < classes) out[y] = c.at_label[k];
      }
    }
    if (outs == x_scratch) narrow(call.out_type, outs, to, n * classes);
  }
}

// A long row, of which each thread takes pieces. Their number, and the order in which they are joined, depend on the
// row alone.
constexpr int64_t kPiece = 32 << 10;

template <Function f>
void in_pieces(const Call& call, int64_t row_index, Threads& threads) {
  const int64_t pieces = call.classes / kPiece;
  struct Data {
    const Call& call;
    int64_t row, pieces;
    std::unique_ptr<State[]> states;
    std::unique_ptr<Largest[]> largest;
    Coefficients c;
    int64_t edge(int64_t i) const { return i == pieces ? call.classes : i * kPiece; }
  } data{call, row_index, pieces, std::make_unique<State[]>(pieces), std::make_unique<Largest[]>(pieces), {}};
  threads.run(pieces, [](const void* p, int64_t i) {
    const Data& d = *(const Data*)p;
    d.states[i] = accumulate<f>(d.call, d.row, d.edge(i), d.edge(i + 1), d.largest[i]);
  }, &data);
  State& s = data.states[0];
  for (int64_t i = 1; i < pieces; i++) {
    State& next = data.states[i];
    const V m = larger(s.m, next.m);
    raise<f>(s, m);
    raise<f>(next, m);
    merge(s, next);
  }
  if (call.largest) {
    const auto later = [](const Largest& a, const Largest& b) { return a.m < b.m; };  // of equal ones the first is kept
    call.largest[row_index] = (int32_t)std::max_element(&data.largest[0], &data.largest[pieces], later)->at;
  }
  data.c = finish_long<f>(call, s, row_index);
  if constexpr (writes(f))
    threads.run(pieces, [](const void* p, int64_t i) {
      const Data& d = *(const Data*)p;
      write<f>(d.call, d.row, d.edge(i), d.edge(i + 1), d.c);
    }, &data);
}

// Rows along the lanes: they are short, or their entries do not lie side by side.

constexpr int kClasses = 64;  // in a tile, up to twice as many in the last
constexpr int kFew = 24;      // classes that are better off so, where nothing has to be turned back

template <int lanes>
struct Tile {
  alignas(64) float entries[2 * kClasses][lanes];
};

// Rows `first` and the n - 1 that follow, classes `start` and the `classes` - 1 that follow.
template <int lanes>
void read_tile(Tile<lanes>& tile, const Call& call, const char* p, Type type, int64_t first, int64_t n, int64_t start,
               int64_t classes) {
  const int size = size_of(type);
  p += offset_of(call, first, start) * size;
  if constexpr (lanes > W) {
    if (n < lanes) std::memset(tile.entries, 0, classes * sizeof tile.entries[0]);
    for (int64_t k = 0; k < classes; k++) widen(type, p + k * call.inner * size, tile.entries[k], n);
  } else {
    // Rows of few classes lie side by side, so that a vector may have the next one's first classes too, unless another
    // thread is about to write over these.
    float scratch[W * kFew + W];
    const float* from = scratch;
    if (type == Type::f32 && call.x != call.out && (call.outer - first) * classes >= W * classes + W) {
      from = (const float*)p;
    } else {
      std::memset(scratch + n * classes, 0, ((W - n) * classes + W) * sizeof(float));
      widen(type, p, scratch, n * classes);
    }
    for (int64_t some = 0; some < classes; some += W) {
      V rows[W];
      for (int r = 0; r < W; r++) rows[r] = load(from + r * classes + some);
      transpose(rows);
      for (int64_t k = some; k < std::min<int64_t>(classes, some + W); k++) store(tile.entries[k], rows[k - some]);
    }
  }
}

template <int lanes>
void write_tile(const Tile<lanes>& tile, const Call& call, int64_t first, int64_t n, int64_t start, int64_t classes) {
  const int size = size_of(call.out_type);
  char* p = call.out + offset_of(call, first, start) * size;
  if constexpr (lanes > W) {
    for (int64_t k = 0; k < classes; k++) narrow(call.out_type, tile.entries[k], p + k * call.inner * size, n);
  } else {
    float scratch[W * kFew + W];
    V rows[(kFew + W - 1) / W][W];
    for (int64_t k = 0; k < classes; k += W) {
      V(&some)[W] = rows[k / W];
      for (int j = 0; j < W; j++) some[j] = k + j < classes ? load(tile.entries[k + j]) : V{};
      transpose(some);
    }
    for (int64_t r = 0; r < n; r++)  // the next row overwrites what is too much
      for (int64_t k = 0; k < classes; k += W) store(scratch + r * classes + k, rows[k / W][r]);
    narrow(call.out_type, scratch, p, n * classes);
  }
}

// The same rows, of which there are as many as lanes, or less.
template <Function f, int lanes>
void across(const Call& call, int64_t first, int64_t n) {
  constexpr int vectors = lanes / W;
  constexpr bool turned = lanes == W;  // rows lie side by side, W of them in as many vectors as there are classes
  Tile<lanes> x, t;
  State states[vectors];
  Row rows[vectors];
  Coefficients coefficients[vectors];
  const auto for_each_block = [&](auto&& body) {
    for (int64_t start = 0, some; start < call.classes; start += some) {
      some = call.classes - start <= 2 * kClasses ? call.classes - start : kClasses;
      body(start, some);
    }
  };
  const auto read = [&](int64_t start, int64_t some) {
    read_tile(x, call, call.x, call.x_type, first, n, start, some);
    if constexpr (has_tangents(f)) read_tile(t, call, call.t, call.t_type, first, n, start, some);
  };
  const auto at = [](const Tile<lanes>& tile, int64_t k, int j) { return load(tile.entries[k] + j * W); };
  const auto count = [&](int j) { return std::clamp<int64_t>(n - j * W, 0, W); };

  for (int j = 0; j < vectors; j++) rows[j] = read_rows<f>(call, first + j * W, count(j));
  for_each_block([&](int64_t start, int64_t some) {
    read(start, some);
    for (int j = 0; j < vectors; j++) {
      State s;
      s.m = states[j].m;
      for (int64_t k = 0; k < some; k++) s.m = larger(at(x, k, j), s.m);
      if (call.largest) {
        const I rose = s.m > states[j].m;
        for (int64_t k = some; k-- > 0;)
          rows[j].largest = (at(x, k, j) == s.m) & rose ? I{} + (int)(start + k) : rows[j].largest;
      }
      raise<f>(states[j], s.m);
      const int64_t here = offset_of(call, first, start) + (turned ? 0 : j * W);
      const Ahead<f> ahead(call, here + (turned ? W * call.classes : lanes), here);
      for (int64_t k = 0; k < some; k++) {
        ahead.fetch_read(k * (turned ? W : call.inner));
        if constexpr (turned) ahead.fetch_written(k * W);  // planes of images push each other out of the caches
        const V t_k = is_label(f) ? all(1.0f) : has_tangents(f) ? at(t, k, j) : V{};
        const I is_label_k = is_label(f) ? rows[j].label == (int)(start + k) : I{};
        const V e = add<f, true>(s, at(x, k, j), t_k, is_label_k);
        if constexpr (is_label(f)) rows[j].of_label = is_label_k ? at(x, k, j) : rows[j].of_label;
        if (writes(f) && f != Function::log_softmax) store(x.entries[k] + j * W, e);  // of an only block, it is final
      }
      merge(states[j], s);
    }
  });
  for (int j = 0; j < vectors; j++) {
    coefficients[j] = finish<f>(states[j], rows[j], (float)call.classes);
    write_rows(call, first + j * W, count(j), rows[j]);
    if (call.largest) std::memcpy(call.largest + first + j * W, &rows[j].largest, count(j) * sizeof(int32_t));
  }
  if constexpr (!writes(f)) return;
  for_each_block([&](int64_t start, int64_t some) {
    const bool kept = some == call.classes;
    if (!kept) read(start, some);
    for (int j = 0; j < vectors; j++) {
      const Coefficients& c = coefficients[j];
      for (int64_t k = 0; k < some; k++) {
        const V e = kept || f == Function::log_softmax ? at(x, k, j) : exp(at(x, k, j) - c.m);
        V v = entry<f>(e, has_tangents(f) ? at(t, k, j) : V{}, c);
        if constexpr (is_label(f)) v = rows[j].label == (int)(start + k) ? c.at_label : v;
        store(x.entries[k] + j * W, c.none ? V{} : v);
      }
    }
    write_tile(x, call, first, n, start, some);
  });
}

constexpr int64_t kTask = 16 << 10;  // entries

// `runs` of `size` rows that lie side by side, in tiles.
template <Function f, int lanes>
void across_tasks(const Call& call, int64_t runs, int64_t size, Threads& threads) {
  const int64_t tiles = (size + lanes - 1) / lanes;
  struct Data {
    const Call& call;
    int64_t size, tiles, all, per_task;
  } data{call, size, tiles, runs * tiles, std::max<int64_t>(1, kTask / (lanes * std::max<int64_t>(1, call.classes)))};
  threads.run((data.all + data.per_task - 1) / data.per_task, [](const void* p, int64_t i) {
    const Data& d = *(const Data*)p;
    for (int64_t tile = i * d.per_task; tile < std::min(d.all, (i + 1) * d.per_task); tile++) {
      const int64_t start = tile % d.tiles * lanes;
      across<f, lanes>(d.call, tile / d.tiles * d.size + start, std::min<int64_t>(lanes, d.size - start));
    }
  }, &data);
}

template <Function f>
void run(const Call& call, Threads& threads) {
  const int64_t rows = call.outer * call.inner, classes = call.classes;
  if (call.inner > 1) return across_tasks<f, 64>(call, call.outer, call.inner, threads);
  if (classes <= (writes(f) ? 15 : kFew)) return across_tasks<f, W>(call, 1, rows, threads);
  if (rows <= 16 && classes >= 2 * kPiece) {
    for (int64_t r = 0; r < rows; r++) in_pieces<f>(call, r, threads);
    return;
  }
  struct Data {
    const Call& call;
    int64_t size;  // rows in a task
  } data{call, kTask / classes < W ? std::max<int64_t>(1, kTask / classes) : kTask / classes / W * W};
  threads.run((rows + data.size - 1) / data.size, [](const void* p, int64_t i) {
    const Data& d = *(const Data*)p;
    const int64_t begin = i * d.size, end = std::min(d.call.outer, begin + d.size);
    d.call.classes <= kShort ? along_short<f>(d.call, begin, end) : along<f>(d.call, begin, end);
  }, &data);
}

// Minus the factor of each row at its label, and 0 elsewhere; NaN where there is no such class.
void place(const Call& call, Threads& threads) {
  threads.run(call.outer, [](const void* p, int64_t outer) {
    const Call& call = *(const Call*)p;
    const int size = size_of(call.out_type);
    char* out = call.out + outer * call.classes * call.inner * size;
    std::memset(out, 0, call.classes * call.inner * size);
    for (int64_t i = 0; i < call.inner; i++) {
      const int64_t y = call.label[outer * call.inner + i];
      const float g = y < call.classes ? -call.factors[0][outer * call.inner + i] : __builtin_nanf("");
      if (y < 0 || g == 0.0f) continue;
      const bool everywhere = g != g;
      for (int64_t k = everywhere ? 0 : y; k < (everywhere ? call.classes : y + 1); k++)
        narrow(call.out_type, &g, out + (k * call.inner + i) * size, 1);
    }
  }, &call);
}

}  // namespace

#define JAXENT_NAME_(level) run_##level
#define JAXENT_NAME(level) JAXENT_NAME_(level)

void jaxent::JAXENT_NAME(JAXENT_LEVEL)(const Call& call, Threads& threads) {
  switch (call.function) {
    case Function::softmax: return run<Function::softmax>(call, threads);
    case Function::log_softmax: return run<Function::log_softmax>(call, threads);
    case Function::softmax_derivative: return run<Function::softmax_derivative>(call, threads);
    case Function::log_softmax_derivative: return run<Function::log_softmax_derivative>(call, threads);
    case Function::log_softmax_pullback: return run<Function::log_softmax_pullback>(call, threads);
    case Function::label_loss: return run<Function::label_loss>(call, threads);
    case Function::label_loss_and_gradient: return run<Function::label_loss_and_gradient>(call, threads);
    case Function::own_label_loss: return run<Function::own_label_loss>(call, threads);
    case Function::own_label_loss_and_gradient: return run<Function::own_label_loss_and_gradient>(call, threads);
    case Function::expected_loss: return run<Function::expected_loss>(call, threads);
    case Function::place: return place(call, threads);
    case Function::expected_loss_and_gradient: return run<Function::expected_loss_and_gradient>(call, threads);
  }
}
