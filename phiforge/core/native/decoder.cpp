// A whole decoder pass in one call: embedding, layers over a paged cache, final norm; then logits.
// Called from Python through ctypes (inference/engine/native.py), which checks every argument.
// Writes the cache and the output arrays; keeps working memory between calls.
//
// Threads walk through phases of small items with a barrier after each. Residual, norms, RoPE,
// softmax and SwiGLU are fp32; matrices take activations in bf16 (fp32 for fp32 weights and where
// the machine has no bf16 products).
//
// compile with: -ffp-contract=off -fvisibility=hidden (multiply-adds are spelled out: common.h)

#include "attention.h"
#include "common.h"
#include "matmul.h"
#include "pack.h"
#include "sampling.h"

namespace phi {

struct Layer {
  const float *attention_norm, *mlp_norm;
  Matrix query_key_value, output, gate_up, down;
};

struct Model {
  int64_t num_layers, hidden, vocab, intermediate, num_heads, num_kv_heads, head_size;
  int64_t rotary_half, window, half;  // half: bf16 embedding, cache and output, else fp32
  double eps;
  const void* embedding;  // [vocab][hidden]
  const float* norm;
  const Layer* layers;
  Matrix lm_head;
};

struct Pass {
  int64_t num_tokens, num_rows, table_width;
  const int32_t *token_ids, *positions, *row_starts, *tables;
  const float *cos, *sin;  // [position][rotary_half]
  void* cache;
  void* out;  // [token][hidden]
  int64_t threads;
};

// gate and up outputs share a panel: 32 of each, so that a panel's sums make activations at once.
constexpr long HALF_PANEL = PANEL / 2;

template <class Act, class Kv>
class Decoder {
 public:
  explicit Decoder(const Model& model)
      : model_(model), layers_(model.layers, model.layers + model.num_layers) {
    heads_ = {model.num_heads, model.num_kv_heads, model.head_size, model.window,
              model.rotary_half};
    hidden_stride_ = row_stride(model.hidden);
    attended_stride_ = row_stride(model.num_heads * model.head_size);
    mlp_stride_ = row_stride(model.intermediate);
    projected_stride_ =
        round_up((model.num_heads + 2 * model.num_kv_heads) * model.head_size, PANEL);
  }

  void forward(const Pass& pass) {
    const long n = pass.num_tokens;
    prepare(n, pass.threads);
    plan_queries(pass);
    std::vector<Counter> counters(8 * layers_.size() + 2);
    in_parallel((int)pass.threads, counters, [&](Team& team, int thread) {
      Worker worker{*this, pass, team, *threads_[thread]};
      worker.run();
    });
  }

  // logits[m][vocab] = x W^T
  void logits(const Kv* x, long rows, float* out, int threads) {
    prepare(rows, threads);
    std::vector<Counter> counters(2);
    in_parallel(threads, counters, [&](Team& team, int thread) {
      Act* acts = normed_.get();
      team.each(rows, [&](long row) {
        for (long i = 0; i < model_.hidden; i++)
          write_one(acts + row * hidden_stride_ + i, read_one(x + row * model_.hidden + i));
      });
      team.wait();
      matmul(team, threads, model_.lm_head, rows, acts, hidden_stride_, threads_[thread]->matmul,
             [&](long first, long count, long panel, const float* sums) {
               const long width = std::min(PANEL, model_.vocab - panel * PANEL);
               for (long r = 0; r < count; r++)
                 std::memcpy(out + (first + r) * model_.vocab + panel * PANEL, sums + r * PANEL,
                             width * sizeof(float));
             });
    });
  }

 private:
  struct Thread {
    MatmulScratch matmul;
    AttentionScratch<Act> attention;
    Buffer<Act> normed;  // a copy of its own of the few rows of a small pass
  };

  // Consecutive tokens of one row whose attention is one item per key head.
  struct Queries {
    int32_t row, first, count;
  };

  static constexpr long FEW_ROWS = 4;  // every thread normalises them for itself: one barrier less

  struct Worker {
    Decoder& d;
    const Pass& pass;
    Team& team;
    Thread& own;

    long n() const { return pass.num_tokens; }
    const Model& model() const { return d.model_; }
    bool few() const { return n() <= FEW_ROWS; }
    Act* normed() const { return few() ? own.normed.get() : d.normed_.get(); }
    float* residual(long token) const { return d.residual_.get() + token * d.hidden_stride_; }

    void run() {
      team.each(n(), [&](long token) { embed(token); });
      team.wait();
      for (long layer = 0; layer < model().num_layers; layer++) {
        attention_half(layer, d.layers_[layer]);
        mlp_half(d.layers_[layer]);
      }
      team.each(n(), [&](long token) {
        norm(residual(token), model().norm, (Kv*)pass.out + token * model().hidden);
      });
    }

    void embed(long token) {
      const Kv* from = (const Kv*)model().embedding + pass.token_ids[token] * model().hidden;
      float* to = residual(token);
      for (long i = 0; i < model().hidden; i++) to[i] = read_one(from + i);
    }

    void attention_half(long layer, const Layer& w) {
      normalise(w.attention_norm);
      multiply_rows(w.query_key_value, normed(), d.hidden_stride_,
                    [&](long first, long count, long panel, const float* sums) {
                      for (long r = 0; r < count; r++)
                        std::memcpy(d.projected_.get() + (first + r) * d.projected_stride_ +
                                        panel * PANEL,
                                    sums + r * PANEL, PANEL * sizeof(float));
                    });
      if (d.num_written_ > 0) {
        team.each(d.num_written_, [&](long item) { write_prompt_token(layer, item); });
        team.wait();
      }
      const long items = (long)d.queries_.size() * model().num_kv_heads;
      team.each(items, [&](long item, long next) {
        const long heads = model().num_kv_heads;
        if (next < items) fetch_item(layer, d.queries_[next / heads], next % heads);
        attend_item(layer, d.queries_[item / heads], item % heads);
      });
      team.wait();
      add_product(w.output, d.attended_.get(), d.attended_stride_);
    }

    void mlp_half(const Layer& w) {
      normalise(w.mlp_norm);
      multiply_rows(w.gate_up, normed(), d.hidden_stride_,
                    [&](long first, long count, long panel, const float* sums) {
                      for (long r = 0; r < count; r++)
                        swiglu(sums + r * PANEL, d.activated_.get() +
                                                     (first + r) * d.mlp_stride_ +
                                                     panel * HALF_PANEL);
                    });
      add_product(w.down, d.activated_.get(), d.mlp_stride_);
    }

    template <class Finish>
    void multiply_rows(const Matrix& m, const Act* x, long stride, Finish finish) {
      matmul(team, (int)pass.threads, m, n(), x, stride, own.matmul, finish);
      team.wait();
    }

    // residual += x W^T
    void add_product(const Matrix& m, const Act* x, long stride) {
      multiply_rows(m, x, stride, [&](long first, long count, long panel, const float* sums) {
        for (long r = 0; r < count; r++) {
          float* to = residual(first + r) + panel * PANEL;
          const long width = std::min(PANEL, d.hidden_stride_ - panel * PANEL);
          for (long i = 0; i < width; i++) to[i] += sums[r * PANEL + i];
        }
      });
    }

    void normalise(const float* weight) {
      auto one = [&](long token) {
        norm(residual(token), weight, normed() + token * d.hidden_stride_);
      };
      if (few()) {
        for (long token = 0; token < n(); token++) one(token);
        return;
      }
      team.each(n(), one);
      team.wait();
    }

    // RMSNorm: x / sqrt(mean(x^2) + eps) x weight, in the output's type.
    template <class Out>
    void norm(const float* x, const float* weight, Out* out) {
      const long size = model().hidden, whole = size / LANES * LANES;
      f32x16 squares = {};
      for (long i = 0; i < whole; i += LANES) squares = fma(load(x + i), load(x + i), squares);
      float sum = sum_lanes(squares);
      for (long i = whole; i < size; i++) sum += x[i] * x[i];
      const float scale = 1.0f / std::sqrt(sum / (float)size + (float)model().eps);
      for (long i = 0; i < whole; i += LANES)
        write(out + i, load(x + i) * scale * load(weight + i));
      for (long i = whole; i < size; i++) write_one(out + i, x[i] * scale * weight[i]);
    }

    void swiglu(const float* sums, Act* out) {
      for (long i = 0; i < HALF_PANEL; i += LANES) {
        f32x16 gate = load(sums + i), up = load(sums + HALF_PANEL + i);
        write(out + i, gate / (exp(-gate) + 1.0f) * up);
      }
    }

    HeadBlock<Act, Kv> block(long row, long j, long layer, long head) const {
      const long e = d.heads_.padded(), number = pass.tables[row * pass.table_width + j];
      const long index = (number * model().num_layers + layer) * model().num_kv_heads + head;
      return {(Kv*)pass.cache + index * HeadBlock<Act, Kv>::elements(e), e};
    }

    // Key (turned) and value of one token and key head into the cache.
    void write_token(long layer, long row, long token, long head) {
      const long e = model().head_size, position = pass.positions[token];
      const float* projected = d.projected_.get() + token * d.projected_stride_;
      const float* key = projected + (model().num_heads + head) * e;
      float* turned = own.attention.head.get();
      rope(key, e, model().rotary_half, cos(position), sin(position), turned);
      float* value = own.attention.value.get();
      std::copy_n(key + model().num_kv_heads * e, e, value);
      block(row, position / BLOCK, layer, head)
          .write(position % BLOCK, turned, value, token + 1 == pass.row_starts[row + 1]);
    }

    void write_prompt_token(long layer, long item) {
      const Decoder::Queries& token = d.written_[item];
      for (long head = 0; head < model().num_kv_heads; head++)
        write_token(layer, token.row, token.first, head);
    }

    void attend_item(long layer, const Queries& queries, long head) {
      const long e = model().head_size, padded = d.heads_.padded(), group = d.heads_.group();
      if (is_single(queries.row)) write_token(layer, queries.row, queries.first, head);
      float* turned = own.attention.head.get();
      Act* to = own.attention.queries.get();
      for (long t = 0; t < queries.count; t++)
        for (long g = 0; g < group; g++, to += padded) {
          const long token = queries.first + t, position = pass.positions[token];
          rope(d.projected_.get() + token * d.projected_stride_ + (head * group + g) * e, e,
               model().rotary_half, cos(position), sin(position), turned);
          write_scaled(to, turned, 1.0f, padded);
        }
      attend<Act, Kv>(
          d.heads_, pass.positions[queries.first], queries.count, own.attention,
          [&](long j) { return block(queries.row, j, layer, head); },
          [&](long r, const float* sums, float inverse) {
            Act* out = d.attended_.get() + (queries.first + r / group) * d.attended_stride_ +
                       (head * group + r % group) * e;
            write_scaled(out, sums, inverse, e);
          });
    }

    // The cache's first lines of an item that comes next: their latency would be most of its time.
    void fetch_item(long layer, const Queries& queries, long head) {
      const long position = pass.positions[queries.first];
      const long window = model().window ? model().window : position + 1;
      block(queries.row, std::max(0L, position - window + 1) / BLOCK, layer, head).fetch();
      if (is_single(queries.row))
        block(queries.row, position / BLOCK, layer, head).fetch(position % BLOCK);
    }

    bool is_single(long row) const { return pass.row_starts[row + 1] - pass.row_starts[row] == 1; }
    const float* cos(long position) const { return pass.cos + position * model().rotary_half; }
    const float* sin(long position) const { return pass.sin + position * model().rotary_half; }
  };

  // Attention items: a decode row's token by itself (it also writes its key and value), a longer
  // row in tiles; the longer rows' tokens are written in a phase of their own before.
  void plan_queries(const Pass& pass) {
    queries_.clear();
    written_.clear();
    for (int32_t row = 0; row < pass.num_rows; row++) {
      const int32_t first = pass.row_starts[row], end = pass.row_starts[row + 1];
      const int32_t step = (int32_t)heads_.tile_tokens();
      for (int32_t t = first; t < end; t += step)
        queries_.push_back({row, t, std::min(step, end - t)});
      if (end - first > 1)
        for (int32_t t = first; t < end; t++) written_.push_back({row, t, 1});
    }
    num_written_ = (long)written_.size();
  }

  // Whole groups, and one more: rows a power of two apart would fight for the same cache lines.
  static long row_stride(long size) { return round_up(size, GROUP) + GROUP; }

  // Working memory for n tokens. What pads a row must be zero: weights there are zero, but zero
  // times NaN is NaN.
  void prepare(long n, long threads) {
    zeroed(residual_, n * hidden_stride_);
    zeroed(normed_, n * hidden_stride_);
    zeroed(attended_, n * attended_stride_);
    zeroed(activated_, n * mlp_stride_);
    zeroed(projected_, n * projected_stride_);
    while ((long)threads_.size() < threads) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->attention.fit(heads_);
      zeroed(threads_.back()->normed, FEW_ROWS * hidden_stride_);
    }
  }
  template <class T>
  static void zeroed(Buffer<T>& buffer, size_t count) {
    if (!buffer.holds(count)) std::fill_n(buffer.need(count), count, T(0));
  }

  Model model_;
  std::vector<Layer> layers_;
  Heads heads_;
  long hidden_stride_, attended_stride_, mlp_stride_, projected_stride_;
  Buffer<float> residual_, projected_;
  Buffer<Act> normed_, attended_, activated_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Queries> queries_, written_;
  long num_written_ = 0;
};

typedef Decoder<float, float> FullDecoder;
typedef Decoder<Half, uint16_t> HalfDecoder;

struct Handle {
  std::unique_ptr<FullDecoder> full;
  std::unique_ptr<HalfDecoder> half;
};

// 0: done; 1: no memory.
template <class Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace phi

using namespace phi;

PHI_EXPORT void* phiforge_decoder_create(const Model* model) {
  std::unique_ptr<Handle> handle(new (std::nothrow) Handle);
  if (!handle) return nullptr;
  int failed = guarded([&] {
    if (model->half)
      handle->half = std::make_unique<HalfDecoder>(*model);
    else
      handle->full = std::make_unique<FullDecoder>(*model);
  });
  return failed ? nullptr : handle.release();
}

PHI_EXPORT void phiforge_decoder_destroy(void* handle) { delete (Handle*)handle; }

PHI_EXPORT int phiforge_decoder_forward(void* handle, const Pass* pass) {
  return guarded([&] {
    Handle& decoder = *(Handle*)handle;
    decoder.half ? decoder.half->forward(*pass) : decoder.full->forward(*pass);
  });
}

PHI_EXPORT int phiforge_decoder_logits(void* handle, const void* x, int64_t rows, float* out,
                                       int64_t threads) {
  return guarded([&] {
    Handle& decoder = *(Handle*)handle;
    if (decoder.half)
      decoder.half->logits((const uint16_t*)x, rows, out, (int)threads);
    else
      decoder.full->logits((const float*)x, rows, out, (int)threads);
  });
}

// One token id per row of logits; finite[row] 0 says that the row is damaged.
PHI_EXPORT int phiforge_draw(const float* logits, int64_t rows, int64_t vocab,
                             const double* temperatures, const double* min_ps,
                             const double* uniforms, int64_t* ids, uint8_t* finite,
                             int64_t threads) {
  return guarded([&] {
    const long blocks = ceil_div(vocab, TOKEN_BLOCK);
    std::vector<Counter> counters(1);
    std::vector<double> ends(rows * blocks);
    in_parallel((int)threads, counters, [&](Team& team, int) {
      team.each(rows, [&](long r) {
        finite[r] = draw(logits + r * vocab, vocab, temperatures[r], min_ps[r], uniforms[r],
                         ends.data() + r * blocks, ids + r);
      });
    });
  });
}

// Elements of one block's keys and values of one layer and key head.
PHI_EXPORT int64_t phiforge_head_elements(int64_t head_size) {
  return 2 * BLOCK * round_up(head_size, LANES);
}

// Bytes of a packed matrix without int8 scales (those are one float per padded output).
PHI_EXPORT int64_t phiforge_packed_bytes(int64_t num_outputs, int64_t num_inputs, int64_t format) {
  Matrix m{nullptr, nullptr, num_outputs, num_inputs, format};
  return m.num_panels() * m.panel_bytes();
}

// rows: the row at rest of every padded output, -1 for zeros.
PHI_EXPORT int phiforge_pack(const AtRest* from, const int32_t* rows, int64_t num_outputs,
                             uint8_t* panels, float* scales, int64_t threads) {
  Matrix m{panels, scales, num_outputs, from->num_inputs, from->format};
  return guarded([&] {
    std::vector<Counter> counters(1);
    in_parallel((int)threads, counters, [&](Team& team, int) {
      team.each(m.num_panels(), [&](long panel) {
        pack_panel(*from, rows + panel * PANEL, panels + panel * m.panel_bytes(),
                   scales + panel * PANEL);
      });
    });
  });
}

// Asks for large pages: a pass reads all weights once, and small pages cost a walk every 4 KB.
PHI_EXPORT void phiforge_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  uintptr_t first = round_up((uintptr_t)memory, 4096), end = ((uintptr_t)memory + bytes) & ~4095UL;
  if (end > first) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}
