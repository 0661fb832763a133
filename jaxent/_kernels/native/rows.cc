// The row functions, for the instruction set that this file is compiled for.
//
// A row is read once from memory: a block of it that fits the first-level cache is compared with the largest logit so
// far, what has been added up is made relative to the new largest, and the block is added. What a lane of a vector
// adds up is either of classes k, k + W, ... of one row, and lanes are joined at its end, or of a row of its own.
// Functions with a result of the logits' size read the row once more, from the second-level cache, and write.
#include "rows.h"

#include <algorithm>
#include <memory>

#include "vector.h"

namespace {

using jaxent::Call;
using jaxent::Function;
using jaxent::Threads;

constexpr bool is_derivative(Function f) {
  return f == Function::softmax_derivative || f == Function::log_softmax_derivative;
}
constexpr bool is_label(Function f) {
  return f == Function::label_loss || f == Function::label_loss_and_gradient;
}
constexpr bool is_expected(Function f) {
  return f == Function::expected_loss || f == Function::expected_loss_and_gradient;
}
constexpr bool has_tangents(Function f) {
  return is_derivative(f) || f == Function::log_softmax_pullback || is_expected(f);
}
constexpr bool writes(Function f) { return f != Function::label_loss && f != Function::expected_loss; }

// What has been added up.
struct State {
  V m = all(kLowest);   // the largest logit
  V total = {};         // of exp(x - m); of a label's loss without the label
  V others = {};        // of the same without the largest
  V at_largest = {};    // of t of the largest
  V at_others = {};     // of t of the others, for derivatives times exp(x - m)
  V gaps = {};          // of t * (m - x)
};

// Make sums relative to a logit that is at least as large as all so far.
template <Function f>
inline void raise(State& s, V m) {
  const I rose = m > s.m;
  const V r = exp(s.m - m);
  if constexpr (is_label(f) || is_expected(f)) {
    const V mass = s.at_largest + s.at_others;
    s.gaps += mass == 0.0f ? V{} : mass * (m - s.m);
  }
  if constexpr (!is_label(f) && f != Function::softmax) s.others = (rose ? s.total : s.others) * r;
  if constexpr (has_tangents(f)) {
    s.at_others += rose ? s.at_largest : V{};
    s.at_largest = rose ? V{} : s.at_largest;
  }
  if constexpr (is_derivative(f)) s.at_others *= r;
  s.total *= r;
  s.m = m;
}

template <Function f, bool excluding = false>
inline void add(State& s, V x, V t, I excluded) {
  const V d = x - s.m, e = exp(d);
  const I largest = x == s.m;
  s.total += excluding && is_label(f) ? (excluded ? V{} : e) : e;
  if constexpr (!is_label(f) && f != Function::softmax) s.others += largest ? V{} : e;
  if constexpr (is_derivative(f)) {
    s.at_largest += largest ? t : V{};
    s.at_others += (largest ? V{} : e) * t;
  } else if constexpr (has_tangents(f)) {
    s.at_largest += largest ? t : V{};
    s.at_others += largest ? V{} : t;
  }
  if constexpr (is_label(f)) s.at_others += t;
  if constexpr (is_label(f) || is_expected(f)) s.gaps -= t == 0.0f ? V{} : t * d;
}

// Sums of each of W rows, a lane for each, from lanes that belong to one row.
template <Function f>
inline State join(State (&rows)[W], int n) {
  V lanes[W];
  const auto gather = [&](V State::*sum) {
    for (int k = 0; k < W; k++) lanes[k] = rows[k].*sum;
    return reduce_each(lanes, [](V a, V b) { return a + b; });
  };
  for (int k = 0; k < W; k++) lanes[k] = rows[k].m;
  State s;
  s.m = reduce_each(lanes, [](V a, V b) { return larger(a, b); });
  for (int k = 0; k < n; k++) raise<f>(rows[k], all(s.m[k]));
  s.total = gather(&State::total);
  if constexpr (!is_label(f) && f != Function::softmax) s.others = gather(&State::others);
  if constexpr (has_tangents(f)) s.at_largest = gather(&State::at_largest);
  if constexpr (has_tangents(f) || is_label(f)) s.at_others = gather(&State::at_others);
  if constexpr (is_label(f) || is_expected(f)) s.gaps = gather(&State::gaps);
  return s;
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
  I label = {};
  V of_label = {};  // its logit; NaN if there is no such class
  V factors[3] = {};
  V results[3] = {};
};

template <Function f>
inline Coefficients finish(State s, Row& rows, float classes) {
  const V nan = all(__builtin_nanf(""));
  Coefficients c = {};
  c.m = s.m;
  if constexpr (is_label(f)) {
    const V gap = rows.of_label - s.m, of_label = exp(gap), others = s.total;
    const V total = others + of_label == 0.0f ? nan : others + of_label;  // 0: every logit is -inf
    const V log_total = gap == 0.0f ? log1p(others) : log(total);
    const V loss = log_total - gap, uniform = log_total + s.gaps / classes, lse = s.m + log_total;
    c.none = rows.label < 0;
    rows.results[0] = c.none ? V{} : total == total ? loss : nan;
    rows.results[1] = c.none ? V{} : total == total ? uniform : nan;
    rows.results[2] = c.none ? V{} : total == total ? lse : nan;
    const V a = rows.factors[0], u = rows.factors[1], shared = u + 2.0f * rows.factors[2] * lse;
    c.a = (a + shared) / total;
    c.b = u / classes;
    c.at_label = (shared * of_label - a * others) / total - c.b;
    return c;
  }
  const V total = s.total == 0.0f ? nan : s.total, mass = s.at_largest + s.at_others;
  const I dominated = total < 1.5f;  // one class has two thirds of the probability
  c.threshold = dominated ? all(0.75f) : all(2.0f);
  c.a = 1.0f / total;
  if constexpr (f == Function::log_softmax) c.a = dominated ? log1p(s.others) : log(total);
  if constexpr (is_derivative(f)) {
    c.b = dominated ? s.at_largest : V{};
    c.c = (dominated ? s.at_others - s.others * s.at_largest : mass) / total;
  }
  if constexpr (f == Function::log_softmax_pullback) {
    c.a = mass / total;
    c.b = (s.at_largest * s.others - s.at_others) / total;
  }
  if constexpr (is_expected(f)) {
    const V log_total = dominated ? log1p(s.others) : log(total);
    rows.results[0] = s.gaps + mass * log_total;
    c.c = rows.factors[0];
    c.a = c.c * (mass / total);
    c.b = c.c * (s.at_others - mass * s.others / total);
    c.none = c.c == 0.0f;
  }
  return c;
}

template <Function f>
inline V entry(V x, V t, const Coefficients& c) {
  const V d = x - c.m;
  if constexpr (f == Function::log_softmax) return d - c.a;
  const V e = exp(d);
  if constexpr (f == Function::softmax) return e * c.a;
  if constexpr (f == Function::softmax_derivative) return e * c.a * ((e > c.threshold ? V{} : t - c.b) - c.c);
  if constexpr (f == Function::log_softmax_derivative) return (e > c.threshold ? V{} : t - c.b) - c.c;
  if constexpr (f == Function::log_softmax_pullback) return e > c.threshold ? c.b : t - e * c.a;
  if constexpr (is_label(f)) return e * c.a - c.b;
  if constexpr (is_expected(f)) return e > c.threshold ? c.b : e * c.a - c.c * t;
}

// Classes along the lanes. They lie side by side and are at least W.

constexpr int64_t kBlock = 1024;       // floats in a first-level cache, beside two more such arrays
constexpr int64_t kGroup = 256 << 10;  // bytes of rows in a second-level cache

// The next block of a row that ends at `end`: none is shorter than a vector.
inline int64_t block(int64_t start, int64_t end) { return end - start <= 2 * kBlock ? end - start : kBlock; }

inline const float* floats(const char* p, Type type, int64_t offset, int64_t n, float* scratch) {
  p += offset * size_of(type);
  if (type == Type::f32) return (const float*)p;
  widen(type, p, scratch, n);
  return scratch;
}

template <Function f>
void accumulate_block(State& s, const float* x, const float* t, int64_t n, int64_t label) {
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
  raise<f>(s, larger(larger(m, m1), larger(m2, m3)));

  const auto tangent = [&](int64_t i) { return is_label(f) ? all(1.0f) : has_tangents(f) ? load(t + i) : V{}; };
  if (is_label(f) && 0 <= label && label < n) {
    for (i = 0; i < whole; i += W) add<f, true>(s, load(x + i), tangent(i), iota() + (int)i == (int)label);
    if (whole < n) add<f, true>(s, last, rest ? tangent(n - W) : V{}, iota() + (int)(n - W) == (int)label);
  } else {
    for (i = 0; i < whole; i += W) add<f>(s, load(x + i), tangent(i), I{});
    if (whole < n) add<f>(s, last, rest ? tangent(n - W) : V{}, I{});
  }
}

template <Function f>
State accumulate(const Call& call, int64_t row, int64_t begin, int64_t end) {
  float x[2 * kBlock], t[2 * kBlock];
  State s;
  const int64_t label = is_label(f) ? call.label[row] : -1;
  for (int64_t start = begin, n; start < end; start += n) {
    n = block(start, end);
    const int64_t offset = row * call.classes + start;
    accumulate_block<f>(s, floats(call.x, call.x_type, offset, n, x),
                        has_tangents(f) ? floats(call.t, call.t_type, offset, n, t) : nullptr, n, label - start);
  }
  return s;
}

template <Function f>
void write_block(const float* x, const float* t, float* out, int64_t n, const Coefficients& c) {
  const auto at = [&](int64_t i) { return entry<f>(load(x + i), has_tangents(f) ? load(t + i) : V{}, c); };
  const int64_t whole = n - n % W;
  const V last = whole < n ? at(n - W) : V{};  // before its first entries may be overwritten
  for (int64_t i = 0; i < whole; i += W) store(out + i, at(i));
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
      write_block<f>(floats(call.x, call.x_type, offset, n, x), tangents, out, n, c);
    if (is_label(f) && !c.none[0] && start <= call.label[row] &&
        call.label[row] < start + n)
      out[call.label[row] - start] = c.at_label[0];
    if (out == scratch) narrow(call.out_type, scratch, to, n);
  }
}

inline float number(const char* p, Type type, int64_t offset) {
  float x;
  widen(type, p + offset * size_of(type), &x, 1);
  return x;
}

// Of rows `first` and the n - 1 that follow, whose entries lie `inner` apart.
template <Function f>
Row read_rows(const Call& call, int64_t first, int64_t n) {
  Row rows;
  for (int64_t k = 0; k < n; k++) {
    const int64_t r = first + k, start = r / call.inner * call.classes * call.inner + r % call.inner;
    if constexpr (is_label(f)) {
      const int32_t y = call.label[r];
      rows.label[k] = y;
      rows.of_label[k] =
          0 <= y && y < call.classes ? number(call.x, call.x_type, start + y * call.inner) : __builtin_nanf("");
    }
    for (int j = 0; j < 3; j++)
      if (call.factors[j]) rows.factors[j][k] = call.factors[j][r];
  }
  return rows;
}

inline void write_rows(const Call& call, int64_t first, int64_t n, const Row& rows) {
  for (int j = 0; j < 3; j++)
    if (call.rows[j])
      for (int64_t k = 0; k < n; k++) call.rows[j][first + k] = rows.results[j][k];
}

// Rows `first` and the n - 1 that follow, at most W, whose sums are in `states`.
template <Function f>
Coefficients finish_rows(const Call& call, State (&states)[W], int64_t first, int64_t n) {
  Row rows = read_rows<f>(call, first, n);
  const Coefficients c = finish<f>(join<f>(states, (int)n), rows, (float)call.classes);
  write_rows(call, first, n, rows);
  return c;
}

template <Function f>
void along(const Call& call, int64_t begin, int64_t end) {
  const int64_t bytes = call.classes * (size_of(call.x_type) + (has_tangents(f) ? size_of(call.t_type) : 0));
  const int64_t group = std::clamp<int64_t>(kGroup / bytes, 1, W);
  for (int64_t first = begin; first < end; first += group) {
    const int64_t n = std::min(group, end - first);
    State states[W];
    for (int64_t k = 0; k < n; k++) states[k] = accumulate<f>(call, first + k, 0, call.classes);
    const Coefficients c = finish_rows<f>(call, states, first, n);
    if constexpr (writes(f))
      for (int64_t k = 0; k < n; k++) write<f>(call, first + k, 0, call.classes, row(c, (int)k));
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
    Coefficients c;
    int64_t edge(int64_t i) const { return i == pieces ? call.classes : i * kPiece; }
  } data{call, row_index, pieces, std::make_unique<State[]>(pieces), {}};
  threads.run(pieces, [](const void* p, int64_t i) {
    const Data& d = *(const Data*)p;
    d.states[i] = accumulate<f>(d.call, d.row, d.edge(i), d.edge(i + 1));
  }, &data);
  State states[W];
  State& s = states[0] = data.states[0];
  for (int64_t i = 1; i < pieces; i++) {
    State& next = data.states[i];
    const V m = larger(s.m, next.m);
    raise<f>(s, m);
    raise<f>(next, m);
    for (const auto sum : {&State::total, &State::others, &State::at_largest, &State::at_others, &State::gaps})
      s.*sum += next.*sum;
  }
  data.c = row(finish_rows<f>(call, states, row_index, 1), 0);
  if constexpr (writes(f))
    threads.run(pieces, [](const void* p, int64_t i) {
      const Data& d = *(const Data*)p;
      write<f>(d.call, d.row, d.edge(i), d.edge(i + 1), d.c);
    }, &data);
}

// Rows along the lanes: they are too short for vectors, or their entries do not lie side by side.

constexpr int kLanes = 64;    // rows in a tile
constexpr int kClasses = 64;  // classes in a tile, up to twice as many in the last

struct Tile {
  alignas(64) float entries[2 * kClasses][kLanes];
};

// Rows `first` and the n - 1 that follow, of the same `outer`; classes `start` and the `classes` - 1 that follow.
inline int64_t offset_of(const Call& call, int64_t first, int64_t start) {
  return (first / call.inner * call.classes + start) * call.inner + first % call.inner;
}

void read_tile(Tile& tile, const Call& call, const char* p, Type type, int64_t first, int64_t n, int64_t start,
               int64_t classes) {
  const int size = size_of(type);
  p += offset_of(call, first, start) * size;
  if (n < kLanes) std::memset(tile.entries, 0, classes * sizeof tile.entries[0]);
  if (call.inner > 1) {
    for (int64_t k = 0; k < classes; k++) widen(type, p + k * call.inner * size, tile.entries[k], n);
    return;
  }
  float scratch[W * kLanes];  // rows of less than W classes lie side by side
  const float* rows = floats(p, type, 0, n * classes, scratch);
  for (int64_t r = 0; r < n; r++)
    for (int64_t k = 0; k < classes; k++) tile.entries[k][r] = rows[r * classes + k];
}

void write_tile(const Tile& tile, const Call& call, int64_t first, int64_t n, int64_t start, int64_t classes) {
  const int size = size_of(call.out_type);
  char* p = call.out + offset_of(call, first, start) * size;
  if (call.inner > 1) {
    for (int64_t k = 0; k < classes; k++) narrow(call.out_type, tile.entries[k], p + k * call.inner * size, n);
    return;
  }
  float scratch[W * kLanes];
  float* rows = call.out_type == Type::f32 ? (float*)p : scratch;
  for (int64_t r = 0; r < n; r++)
    for (int64_t k = 0; k < classes; k++) rows[r * classes + k] = tile.entries[k][r];
  if (rows == scratch) narrow(call.out_type, scratch, p, n * classes);
}

template <Function f>
void across(const Call& call, int64_t first, int64_t n) {
  Tile x, t;
  constexpr int vectors = kLanes / W;
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
  const auto at = [](const Tile& tile, int64_t k, int j) { return load(tile.entries[k] + j * W); };

  for (int j = 0; j < vectors; j++)
    rows[j] = read_rows<f>(call, first + j * W, std::clamp<int64_t>(n - j * W, 0, W));
  for_each_block([&](int64_t start, int64_t some) {
    read(start, some);
    for (int j = 0; j < vectors; j++) {
      State s = states[j];
      V m = s.m;
      for (int64_t k = 0; k < some; k++) m = larger(at(x, k, j), m);
      raise<f>(s, m);
      for (int64_t k = 0; k < some; k++)
        add<f, true>(s, at(x, k, j), is_label(f) ? all(1.0f) : at(t, k, j), rows[j].label == (int)(start + k));
      states[j] = s;
    }
  });
  for (int j = 0; j < vectors; j++) {
    coefficients[j] = finish<f>(states[j], rows[j], (float)call.classes);
    write_rows(call, first + j * W, std::clamp<int64_t>(n - j * W, 0, W), rows[j]);
  }
  if constexpr (!writes(f)) return;
  for_each_block([&](int64_t start, int64_t some) {
    if (some < call.classes) read(start, some);
    for (int j = 0; j < vectors; j++) {
      const Coefficients& c = coefficients[j];
      for (int64_t k = 0; k < some; k++) {
        V v = entry<f>(at(x, k, j), at(t, k, j), c);
        if constexpr (is_label(f)) v = rows[j].label == (int)(start + k) ? c.at_label : v;
        store(x.entries[k] + j * W, c.none ? V{} : v);
      }
    }
    write_tile(x, call, first, n, start, some);
  });
}

constexpr int64_t kTask = 64 << 10;  // bytes of logits

template <Function f>
void run(const Call& call, Threads& threads) {
  const int64_t rows = call.outer * call.inner, classes = call.classes;
  struct Data {
    const Call& call;
    int64_t tiles;  // of each outer
    int64_t size;   // rows in a task
  };
  if (call.inner > 1 || classes < W) {
    // Side by side, all rows are one run of them; else those of each outer.
    const int64_t run = call.inner > 1 ? call.inner : rows;
    const int64_t tiles = (run + kLanes - 1) / kLanes;
    const int64_t per_task = std::max<int64_t>(1, kTask / (4 * kLanes * classes));
    const Data data{call, tiles, per_task};
    const int64_t all_tiles = rows / run * tiles;
    threads.run((all_tiles + per_task - 1) / per_task, [](const void* p, int64_t i) {
      const Data& d = *(const Data*)p;
      const int64_t run = d.call.inner > 1 ? d.call.inner : d.call.outer;
      const int64_t all_tiles = d.call.outer * d.call.inner / run * d.tiles;
      for (int64_t tile = i * d.size; tile < std::min(all_tiles, (i + 1) * d.size); tile++) {
        const int64_t start = tile % d.tiles * kLanes;
        across<f>(d.call, tile / d.tiles * run + start, std::min<int64_t>(kLanes, run - start));
      }
    }, &data);
  } else if (rows <= 16 && classes >= 2 * kPiece) {
    for (int64_t r = 0; r < rows; r++) in_pieces<f>(call, r, threads);
  } else {
    const int64_t size = std::max<int64_t>(1, kTask / (4 * classes) / W * W);
    const Data data{call, 0, size};
    threads.run((rows + size - 1) / size, [](const void* p, int64_t i) {
      const Data& d = *(const Data*)p;
      along<f>(d.call, i * d.size, std::min(d.call.outer, (i + 1) * d.size));
    }, &data);
  }
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
    case Function::expected_loss: return run<Function::expected_loss>(call, threads);
    case Function::expected_loss_and_gradient: return run<Function::expected_loss_and_gradient>(call, threads);
  }
}
