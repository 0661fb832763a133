// What XLA calls: arguments are checked, an instruction set is chosen, and tasks are spread over XLA's own threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using jaxent::Call;
using jaxent::Function;
using jaxent::Threads;
using jaxent::Type;

// A thread of the pool may be busy for long, even with a program that waits for this one. So the caller works too,
// and waits only for tasks that others have begun.
class Pool final : public Threads {
 public:
  explicit Pool(ffi::ThreadPool& pool) : pool_(pool) {}

  void run(int64_t n, void (*task)(const void*, int64_t), const void* data) override {
    const int64_t helpers = std::min(n, pool_.num_threads()) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < n; i++) task(data, i);
      return;
    }
    const auto work = std::make_shared<Work>(n, task, data);  // a helper may come when all is done
    for (int64_t i = 0; i < helpers; i++) pool_.Schedule([work] { work->take(); });
    work->take();
    work->wait();
  }

 private:
  struct Work {
    Work(int64_t n, void (*task)(const void*, int64_t), const void* data) : n(n), task(task), data(data) {}

    void take() {
      int64_t finished = 0;
      for (int64_t i; (i = next.fetch_add(1)) < n; finished++) task(data, i);
      if (finished == 0 || done.fetch_add(finished) + finished < n) return;
      const std::lock_guard<std::mutex> lock(mutex);
      all_done = true;
      condition.notify_one();
    }

    void wait() {
      // A task takes microseconds, as long as to fall asleep and to be woken.
      for (int i = 0; i < 200 && done.load() < n; i++) std::this_thread::yield();
      std::unique_lock<std::mutex> lock(mutex);
      condition.wait(lock, [this] { return all_done; });
    }

    const int64_t n;
    void (*const task)(const void*, int64_t);
    const void* const data;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable condition;
    bool all_done = false;
  };

  ffi::ThreadPool& pool_;
};

// A letter for each argument and result, those of stats where they are asked for. x: logits, t: of their shape, y:
// labels, f: factors of rows; o: of the logits' shape, r: of the rows', p: classes of rows. Of the three F and of the
// three R, factors and losses of labels, there are those that a mask has.
struct Signature {
  std::string_view name, arguments, results;
  Function function;
  std::string_view stats = "";
};

constexpr int64_t kAll = 7, kMean = 2, kOfStats = 5;  // losses of labels

std::string those(std::string_view letters, char masked, int64_t mask) {
  std::string found;
  int i = 0;
  for (const char letter : letters)
    if (letter != masked || (mask >> i++ & 1)) found += letter;
  return found;
}

// Which of the three the next one is.
int next_of(int64_t mask, int after) {
  int i = after + 1;
  while (!(mask >> i & 1)) i++;
  return i;
}

constexpr Signature kSignatures[] = {
    {"softmax", "x", "o", Function::softmax},
    {"log_softmax", "x", "o", Function::log_softmax},
    {"softmax_derivative", "xt", "o", Function::softmax_derivative},
    {"log_softmax_derivative", "xt", "o", Function::log_softmax_derivative},
    {"log_softmax_pullback", "xt", "o", Function::log_softmax_pullback},
    {"label_loss", "xy", "RRR", Function::label_loss, "p"},
    {"label_loss_and_gradient", "xyFFF", "RRRo", Function::label_loss_and_gradient, "p"},
    {"expected_loss", "xt", "r", Function::expected_loss, "rp"},
    {"expected_loss_and_gradient", "xtf", "ro", Function::expected_loss_and_gradient, "rp"},
    {"place", "fy", "o", Function::place},
};

bool read_type(ffi::DataType dtype, Type& type) {
  switch (dtype) {
    case ffi::DataType::F32: type = Type::f32; return true;
    case ffi::DataType::BF16: type = Type::bf16; return true;
    case ffi::DataType::F16: type = Type::f16; return true;
    default: return false;
  }
}

// Whether `dims` are those of the logits, or of the rows, which lack `axis`.
bool fits(ffi::AnyBuffer::Dimensions dims, ffi::AnyBuffer::Dimensions logits, size_t axis, bool rows) {
  if (dims.size() + rows != logits.size()) return false;
  for (size_t i = 0; i < dims.size(); i++)
    if (dims[i] != logits[i + (rows && i >= axis)]) return false;
  return true;
}

// Fresh memory costs a fault for each page that is touched first, and large pages are few. The first and the last that
// the array has a part of are included: the allocator's header makes an array begin a little behind a page's edge.
void expect_writes(char* p, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  if (bytes < page / 2) return;
  const uintptr_t begin = (uintptr_t)p / page * page, end = ((uintptr_t)p + bytes + page - 1) / page * page;
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a hint, whose failure changes nothing
#else
  (void)p, (void)bytes;
#endif
}

struct Level {
  const char* name;
  void (*run)(const Call&, Threads&);
};

// The best instruction set that the processor has; JAXENT_NATIVE_LEVEL=base or avx2 asks for less, to test them.
Level choose() {
  const char* asked = std::getenv("JAXENT_NATIVE_LEVEL");
  const std::string_view at_most = asked ? asked : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && at_most != "base";
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && at_most != "avx2";
  if (avx512) return {"avx512", jaxent::run_avx512};
  if (avx2) return {"avx2", jaxent::run_avx2};
#endif
  return {"base", jaxent::run_base};
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

ffi::Error call(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                std::string_view function, int64_t axis, int64_t terms) {
  const auto wrong = [&](const std::string& what) {
    return ffi::Error::InvalidArgument("jaxent's " + std::string(function) + ": " + what);
  };
  const Signature* signature = nullptr;
  for (const Signature& s : kSignatures)
    if (s.name == function) signature = &s;
  if (!signature) return wrong("there is no such function");
  if (terms < 1 || terms > kAll) return wrong("there are no such terms");
  const std::string given = those(signature->arguments, 'F', terms), wanted = those(signature->results, 'R', terms);
  const bool stats = results.size() != wanted.size();
  const int64_t losses = stats ? terms | kOfStats : terms;
  const std::string made = stats ? those(signature->results, 'R', losses) + std::string(signature->stats) : wanted;
  if (arguments.size() != given.size() || results.size() != made.size())
    return wrong("expected " + std::to_string(given.size()) + " arguments and " + std::to_string(wanted.size()) +
                 " results");

  const auto x = arguments.get<ffi::AnyBuffer>(0);
  auto out = results.get<ffi::AnyBuffer>(0);
  if (!x || !out) return wrong("the logits are no array");
  const auto shape = signature->arguments[0] == 'x' ? x->dimensions() : (*out)->dimensions();
  if (axis < 0 || axis >= (int64_t)shape.size()) return wrong("the logits have no such axis");
  Call c = {};
  c.function = signature->function;
  const bool own = !(losses & kMean);
  if (own && c.function == Function::label_loss) c.function = Function::own_label_loss;
  if (own && c.function == Function::label_loss_and_gradient) c.function = Function::own_label_loss_and_gradient;
  c.outer = c.inner = 1;
  for (int64_t i = 0; i < axis; i++) c.outer *= shape[i];
  c.classes = shape[axis];
  for (size_t i = axis + 1; i < shape.size(); i++) c.inner *= shape[i];

  int factor = -1, row = -1;
  for (size_t i = 0; i < given.size(); i++) {
    const auto a = arguments.get<ffi::AnyBuffer>(i);
    const char kind = given[i];
    const bool of_rows = kind == 'y' || kind == 'f' || kind == 'F';
    const std::string name = "argument " + std::to_string(i);
    if (!a) return wrong(name + " is no array");
    if (!fits(a->dimensions(), shape, axis, of_rows)) return wrong(name + " has the wrong shape");
    const char* p = (const char*)a->untyped_data();
    const ffi::DataType dtype = a->element_type();
    bool known = true;
    if (kind == 'x') known = read_type(dtype, c.x_type), c.x = p;
    if (kind == 't') known = read_type(dtype, c.t_type), c.t = p;
    if (kind == 'y') known = dtype == ffi::DataType::S32, c.label = (const int32_t*)p;
    if (kind == 'f' || kind == 'F') {
      factor = next_of(kind == 'F' ? terms : kAll, factor);
      known = dtype == ffi::DataType::F32, c.factors[factor] = (const float*)p;
    }
    if (!known) return wrong(name + " has the wrong dtype");
  }
  for (size_t i = 0; i < made.size(); i++) {
    auto r = results.get<ffi::AnyBuffer>(i);
    const char kind = made[i];
    const bool of_rows = kind == 'r' || kind == 'R' || kind == 'p';
    const std::string name = "result " + std::to_string(i);
    if (!r) return wrong(name + " is no array");
    if (!fits((*r)->dimensions(), shape, axis, of_rows)) return wrong(name + " has the wrong shape");
    char* p = (char*)(*r)->untyped_data();
    if (of_rows) {
      if ((*r)->element_type() != (kind == 'p' ? ffi::DataType::S32 : ffi::DataType::F32))
        return wrong(name + " has the wrong dtype");
      if (kind == 'p')
        c.largest = (int32_t*)p;
      else
        row = next_of(kind == 'R' ? losses : kAll, row), c.rows[row] = (float*)p;
    } else {
      if (!read_type((*r)->element_type(), c.out_type)) return wrong(name + " has the wrong dtype");
      c.out = p;
      if (p != c.x) expect_writes(p, (*r)->size_bytes());
    }
  }
  if (c.outer == 0 || c.inner == 0) return ffi::Error::Success();
  Pool threads(pool);
  level().run(c, threads);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxent_rows, call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("function")
                                  .Attr<int64_t>("axis")
                                  .Attr<int64_t>("terms"));
extern "C" const char* jaxent_level() { return level().name; }
extern "C" const char* jaxent_sources() { return JAXENT_SOURCES; }  // a hash: is this library compiled from them?
#pragma GCC visibility pop
