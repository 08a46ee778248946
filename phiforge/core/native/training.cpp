// Kernels of the training step on a CPU: what lies between the matrix products, each in one pass.
//
// Called through ctypes by phiforge/model/kernels.py; every function comes for bf16 and for fp32
// values (`_bf16`, `_fp32`). Sums are fp32; their order depends on the number of threads at most.
//
// Names: n tokens, d model size, f feed-forward size, v vocabulary; T the type of activations.
#include <set>

#include "training_attention.h"

namespace phi {

constexpr int64_t kPiece = 16384;  // numbers that one thread takes at a time

// y = x / rms(x) x weight, with x = before + delta first when there is a delta; keeps 1 / rms.
template <class T>
void norm(T* x, const T* before, const T* delta, const float* weight, T* y, float* scales,
          int64_t n, int64_t d, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    T *row = x + i * d, *out = y + i * d;
    if (delta)
      lanes(d, [&](int64_t c, auto count) {
        give(row + c, take(before + i * d + c, count) + take(delta + i * d + c, count), count);
      });
    Floats squares{};
    lanes(d, [&](int64_t c, auto count) {
      const Floats value = take(row + c, count);
      squares = fma(value, value, squares);
    });
    const float scale = 1.0f / sqrtf(add_up(squares) / float(d) + eps);
    scales[i] = scale;
    lanes(d, [&](int64_t c, auto count) {
      give(out + c, take(row + c, count) * scale * take(weight + c, count), count);
    });
  }
}

// d_x = d_skip + the norm's gradient; makes the norm's output again; d_weight += its gradient.
template <class T>
void norm_backward(const T* x, const float* weight, const float* scales, const T* d_y,
                   const T* d_skip, T* d_x, T* y, float* d_weight, int64_t n, int64_t d) {
  const int threads = max_threads();
  std::vector<float> parts(size_t(threads) * d, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    float* part = parts.data() + size_t(this_thread()) * d;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
      const T *row = x + i * d, *dy = d_y + i * d;
      const float scale = scales[i];
      Floats products{};
      lanes(d, [&](int64_t c, auto count) {
        products = fma(take(dy + c, count) * take(weight + c, count), take(row + c, count),
                       products);
      });
      const float along = add_up(products) * scale / float(d);
      lanes(d, [&](int64_t c, auto count) {
        const Floats normed = take(row + c, count) * scale, gradient = take(dy + c, count);
        const Floats factor = take(weight + c, count);
        Floats change = (gradient * factor - normed * along) * scale;
        if (d_skip) change += take(d_skip + i * d + c, count);
        give(part + c, fma(gradient, normed, take(part + c, count)), count);
        give(y + i * d + c, normed * factor, count);
        give(d_x + i * d + c, change, count);
      });
    }
  }
  for (int t = 0; t < threads; t++)
    for (int64_t c = 0; c < d; c++) d_weight[c] += parts[size_t(t) * d + c];
}

// Turns the pairs (i, i + r) of the first `heads` heads of each row, in place, by the angles of its
// position's row in the tables; sign -1 turns back.
template <class T>
void rope(T* x, const float* cosines, const float* sines, const int64_t* positions, int64_t n,
          int64_t row_size, int64_t heads, int64_t head_size, int64_t r, float sign) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < heads; h++) {
      T *first = x + i * row_size + h * head_size, *second = first + r;
      lanes(r, [&](int64_t c, auto count) {
        const Floats cosine = take(cosines + positions[i] * r + c, count);
        const Floats sine = take(sines + positions[i] * r + c, count) * sign;
        const Floats a = take(first + c, count), b = take(second + c, count);
        give(first + c, a * cosine - b * sine, count);
        give(second + c, b * cosine + a * sine, count);
      });
    }
}

PHI_INLINE Floats sigmoid(Floats x) { return splat(1.0f) / (exp(-x) + 1.0f); }

// out = silu(gate) x up, from gate and up in one row.
template <class T>
void swiglu(const T* gate_up, T* out, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    lanes(f, [&](int64_t c, auto count) {
      const T* at = gate_up + i * 2 * f + c;
      const Floats gate = take(at, count);
      give(out + i * f + c, gate * sigmoid(gate) * take(at + f, count), count);
    });
}

// The gradient of gate and up, and the output again.
template <class T>
void swiglu_backward(const T* gate_up, const T* d_out, T* d_gate_up, T* out, int64_t n, int64_t f) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    lanes(f, [&](int64_t c, auto count) {
      const T* at = gate_up + i * 2 * f + c;
      T* to = d_gate_up + i * 2 * f + c;
      const Floats gate = take(at, count), up = take(at + f, count);
      const Floats gradient = take(d_out + i * f + c, count), share = sigmoid(gate);
      const Floats silu = gate * share;
      give(out + i * f + c, silu * up, count);
      give(to + f, gradient * silu, count);
      give(to, gradient * up * (share + silu * (1.0f - share)), count);
    });
}

// -log softmax(row)[target]; with `gradient` the row becomes scale x (softmax - one-hot).
template <class T>
float row_loss(T* row, int64_t target, float scale, bool gradient, float* powers, int64_t v) {
  Floats maxima = splat(read_one(row));
  lanes(v, [&](int64_t c, auto count) {
    if constexpr (std::is_same_v<decltype(count), long>)  // no zeros from behind the end
      for (long k = 0; k < count; k++) maxima = max(maxima, splat(read_one(row + c + k)));
    else
      maxima = max(maxima, take(row + c, count));
  });
  const float maximum = max_lanes(maxima), chosen = read_one(row + target);
  Floats totals{};
  lanes(v, [&](int64_t c, auto count) {
    const Floats power = exp(take(row + c, count) - maximum);
    totals += lane_numbers() < splat(float(count)) ? power : Floats{};
    give(powers + c, power, count);
  });
  const float total = add_up(totals), factor = scale / total;
  if (gradient) {
    lanes(v, [&](int64_t c, auto count) {
      give(row + c, take(powers + c, count) * factor, count);
    });
    write_one(row + target, powers[target] * factor - scale);
  }
  return maximum + logf(total) - chosen;
}

// losses[i] = -log softmax(logits[i])[target]; with `gradient` the logits become its gradient times
// scales[i], or 1 without `scales`.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, const float* scales, float* losses,
                   int64_t gradient, int64_t n, int64_t v) {
#pragma omp parallel
  {
    std::vector<float> powers(v);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++)
      losses[i] = row_loss(logits + i * v, targets[i], scales ? scales[i] : 1.0f, gradient != 0,
                           powers.data(), v);
  }
}

template <class T>
void embed(const float* table, const int64_t* ids, T* x, int64_t n, int64_t d) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    lanes(d, [&](int64_t c, auto count) {
      give(x + i * d + c, take(table + ids[i] * d + c, count), count);
    });
}

// d_table[id] += d_x; each thread owns some rows of the table, so the order of sums is the tokens'.
template <class T>
void embed_backward(const T* d_x, const int64_t* ids, float* d_table, int64_t n, int64_t d) {
#pragma omp parallel
  {
    const int64_t threads = num_threads(), mine = this_thread();
    for (int64_t i = 0; i < n; i++) {
      if (ids[i] % threads != mine) continue;
      float* to = d_table + ids[i] * d;
      lanes(d, [&](int64_t c, auto count) {
        give(to + c, take(to + c, count) + take(d_x + i * d + c, count), count);
      });
    }
  }
}

// to = from, or to += from.
template <class T>
void accumulate(const T* from, float* to, int64_t count, int64_t add) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i += kPiece)
    lanes(std::min(kPiece, count - i), [&](int64_t c, auto size) {
      const Floats value = take(from + i + c, size);
      give(to + i + c, add ? take(to + i + c, size) + value : value, size);
    });
}

int64_t longest_run(const int64_t* starts, int64_t num_runs) {
  int64_t longest = 0;
  for (int64_t run = 0; run < num_runs; run++)
    longest = std::max(longest, starts[run + 1] - starts[run]);
  return longest;
}

template <class T>
void attention(const T* qkv, T* out, float* log_sums, const int64_t* starts, int64_t num_runs,
               int64_t num_heads, int64_t num_kv_heads, int64_t head_size, int64_t window,
               float scale) {
  const AttentionShape s{num_heads, num_kv_heads, head_size, window, scale,
                         int((head_size + 15) / 16 * 16)};
  const int64_t longest = longest_run(starts, num_runs);
#pragma omp parallel
  {
    Scratch scratch(forward_scratch(s, longest));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_runs * num_kv_heads; task++) {
      const int64_t start = starts[task / num_kv_heads];
      attend(s, qkv + start * s.row(), starts[task / num_kv_heads + 1] - start,
             task % num_kv_heads, out + start * num_heads * head_size,
             log_sums + start * num_heads, scratch);
    }
  }
}

template <class T>
void attention_backward(const T* qkv, const T* out, const float* log_sums, const T* d_out,
                        T* d_qkv, const int64_t* starts, int64_t num_runs, int64_t num_heads,
                        int64_t num_kv_heads, int64_t head_size, int64_t window, float scale) {
  const AttentionShape s{num_heads, num_kv_heads, head_size, window, scale,
                         int((head_size + 15) / 16 * 16)};
  const int64_t longest = longest_run(starts, num_runs);
#pragma omp parallel
  {
    Scratch scratch(backward_scratch(s, longest));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_runs * num_kv_heads; task++) {
      const int64_t start = starts[task / num_kv_heads], row = num_heads * head_size;
      attend_backward(s, qkv + start * s.row(), out + start * row, log_sums + start * num_heads,
                      d_out + start * row, starts[task / num_kv_heads + 1] - start,
                      task % num_kv_heads, d_qkv + start * s.row(), scratch);
    }
  }
}

// Tokens of rows [b, t] without padding (document -1): `kept` are their places, `starts` where runs
// of one document begin among them, then their number. Some padding fills them up to a multiple of
// `multiple`, as a run of its own. Returns the number of runs, or -1 when a document of a row comes
// back after another.
inline int64_t find_runs(const int32_t* documents, int64_t b, int64_t t, int64_t multiple,
                         int64_t* starts, int64_t* kept) {
  int64_t runs = 0, tokens = 0;
  std::set<int32_t> seen;
  for (int64_t row = 0; row < b; row++) {
    seen.clear();
    for (int64_t i = 0; i < t; i++) {
      const int32_t* at = documents + row * t + i;
      if (*at == -1) continue;
      if (i == 0 || at[0] != at[-1]) {
        if (!seen.insert(*at).second) return -1;
        starts[runs++] = tokens;
      }
      kept[tokens++] = row * t + i;
    }
  }
  starts[runs] = tokens;
  const int64_t full = std::min<int64_t>(b * t, round_up(tokens, multiple));
  if (tokens == full) return runs;
  for (int64_t i = 0; tokens < full; i++)
    if (documents[i] == -1) kept[tokens++] = i;
  starts[++runs] = tokens;
  return runs;
}

// One AdamW step (arXiv 1711.05101) over many tensors; `shadows` get the new weights in T.
template <class T>
void adamw(int64_t num_tensors, const int64_t* counts, float* const* weights,
           const float* const* gradients, float* const* means, float* const* squares,
           T* const* shadows, const float* decays, float clip, float lr, float beta1, float beta2,
           float eps, float correction1, float correction2) {
  const float step = lr / correction1, root = 1.0f / sqrtf(correction2);
#pragma omp parallel
  for (int64_t k = 0; k < num_tensors; k++) {
    const float shrink = 1.0f - lr * decays[k];
    const float* gradient = gradients[k];
    float *weight = weights[k], *mean = means[k], *square = squares[k];
    T* shadow = shadows[k];
#pragma omp for schedule(static) nowait
    for (int64_t start = 0; start < counts[k]; start += kPiece) {
      const int64_t end = std::min(counts[k], start + kPiece);
#pragma omp simd
      for (int64_t i = start; i < end; i++) {
        const float g = gradient[i] * clip;
        mean[i] += (g - mean[i]) * (1.0f - beta1);
        square[i] = square[i] * beta2 + g * g * (1.0f - beta2);
        weight[i] = weight[i] * shrink - step * mean[i] / (sqrtf(square[i]) * root + eps);
      }
      if (shadow)
        lanes(end - start, [&](int64_t c, auto count) {
          give(shadow + start + c, take(weight + start + c, count), count);
        });
    }
  }
}

// Sum of squares of many tensors, in fixed pieces: the same whatever the number of threads.
inline double sum_of_squares(int64_t num_tensors, const int64_t* counts,
                             const float* const* tensors) {
  int64_t longest = 0;
  double total = 0;
  for (int64_t k = 0; k < num_tensors; k++)
    longest = std::max(longest, (counts[k] + kPiece - 1) / kPiece);
  std::vector<double> pieces(size_t(num_tensors * longest), 0.0);
#pragma omp parallel
  for (int64_t k = 0; k < num_tensors; k++) {
#pragma omp for schedule(static) nowait
    for (int64_t piece = 0; piece < (counts[k] + kPiece - 1) / kPiece; piece++) {
      const float* from = tensors[k] + piece * kPiece;
      const int64_t count = std::min(kPiece, counts[k] - piece * kPiece);
      Floats sum{};
      lanes(count, [&](int64_t c, auto size) {
        const Floats value = take(from + c, size);
        sum = fma(value, value, sum);
      });
      pieces[size_t(k * longest + piece)] = add_up(sum);
    }
  }
  for (const double piece : pieces) total += piece;
  return total;
}

}  // namespace phi

// Addresses of the functions for fp32 and for bf16 values, by name.
#define PHI_EXPORT_BOTH(name)                                                       \
  extern "C" {                                                                      \
  decltype(&phi::name<float>) name##_fp32 = phi::name<float>;                       \
  decltype(&phi::name<phi::bf16>) name##_bf16 = phi::name<phi::bf16>;               \
  }

PHI_EXPORT_BOTH(norm)
PHI_EXPORT_BOTH(norm_backward)
PHI_EXPORT_BOTH(rope)
PHI_EXPORT_BOTH(swiglu)
PHI_EXPORT_BOTH(swiglu_backward)
PHI_EXPORT_BOTH(cross_entropy)
PHI_EXPORT_BOTH(embed)
PHI_EXPORT_BOTH(embed_backward)
PHI_EXPORT_BOTH(accumulate)
PHI_EXPORT_BOTH(attention)
PHI_EXPORT_BOTH(attention_backward)
PHI_EXPORT_BOTH(adamw)

PHI_EXPORT int64_t find_runs(const int32_t* documents, int64_t b, int64_t t, int64_t multiple,
                             int64_t* starts, int64_t* kept) {
  return phi::find_runs(documents, b, t, multiple, starts, kept);
}

PHI_EXPORT double sum_of_squares(int64_t tensors, const int64_t* counts,
                                 const float* const* values) {
  return phi::sum_of_squares(tensors, counts, values);
}
