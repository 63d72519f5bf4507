// rankalloc/fused.py's function for float32 on the CPU: the same formula and the same signature, without Python
// between its products, and with each row of the activations read once per pass for all of an adapter's products.
//
//   forward    per block of rows: z = x Qᵀ, y = b + (z Λ s) Pᵀ;  then y += x Wᵀ
//   backward   per block of rows: u = ∂y P, ∂λ += s Σ z ⊙ u, ∂z = u Λ s, ∂B += ∂yᵀ z, ∂Q += ∂zᵀ x, ∂x = ∂z Q;
//              then ∂P = ∂B Λ s and ∂x += ∂y W or, where that moves less memory, ∂x = ∂y (W + P Λ s Q)
//
// The frozen layers' own products are ATen's or, where the caller says so, oneDNN's (rankalloc/products.py); those come
// first, and what is written per block of rows is added to them. Threads take whole blocks of rows and sum their parts
// of ∂B and ∂Q in the order of their numbers, so equal inputs and an equal number of threads give equal bits.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "skinny.h"

namespace rankalloc {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of a block: x and y of a layer of a few thousand numbers a row stay in the second-level cache.
constexpr int64_t kBlock = 64;
// Rows that a thread takes for every rank, at least: its own part of a gradient is then an eighth of its rows.
constexpr int64_t kRowsARank = 8;
// Of each layer: W (d_out, d_in), P, lam, Q; the biases of those that have one come after all layers.
constexpr int64_t kPerLayer = 4;

Tensor as_rows(const Tensor& t) {
  const Tensor rows = t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
  return rows.stride(1) == 1 && rows.stride(0) >= rows.size(1) ? rows : rows.contiguous();
}

const float* numbers(const Tensor& t) { return t.const_data_ptr<float>(); }

// The loops below read and write by these sizes alone.
void check(const Tensor& t, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat, name, " must be float32 on the CPU");
  TORCH_CHECK(t.sizes() == sizes, "shapes cannot be multiplied: ", name, " is ", t.sizes(), " and should be ", sizes);
}

// work(thread, first row, last row) with each thread's share of n rows, whole blocks.
template <typename Work>
void share_rows(int64_t n, int64_t threads, const Work& work) {
  const int64_t blocks = (n + kBlock - 1) / kBlock, share = (blocks + threads - 1) / threads * kBlock;
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) work(t, std::min(n, t * share), std::min(n, (t + 1) * share));
  });
}

// to (r, d) = from (d, r) turned round; a few rows of ``from`` at a time stay in the first-level cache.
void turn(const float* __restrict from, int64_t d, int64_t r, float* __restrict to) {
  for (int64_t start = 0; start < d; start += skinny::kLanes) {
    const int64_t end = std::min(d, start + skinny::kLanes);
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t c = start; c < end; ++c) to[k * d + c] = from[c * r + k];
    }
  }
}

// to (d, r) = from (r, d) turned round, its rows times scale (r).
void turn_back(
    const float* __restrict from, int64_t d, int64_t r, const float* __restrict scale, float* __restrict to) {
  for (int64_t start = 0; start < d; start += skinny::kLanes) {
    const int64_t end = std::min(d, start + skinny::kLanes);
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t c = start; c < end; ++c) to[c * r + k] = from[k * d + c] * scale[k];
    }
  }
}

// What one layer's outputs need in both directions.
struct Part {
  Tensor weight, p, lam, q;
  double scaling;
  int64_t rank() const { return q.size(0); }
  int64_t outputs() const { return p.size(0); }
  std::vector<float> scale() const {
    const float* from = numbers(lam);
    std::vector<float> scaled(from, from + rank());
    for (float& value : scaled) value *= static_cast<float>(scaling);
    return scaled;
  }
};

// Raises where the shapes of a layer do not fit one another, or inputs of d_in numbers.
std::vector<Part> parts_of(at::TensorList tensors, int64_t first, const std::vector<double>& scalings, int64_t d_in) {
  std::vector<Part> parts;
  for (size_t i = 0; i < scalings.size(); ++i) {
    const auto at = first + kPerLayer * i;
    const Tensor &w = tensors[at], &p = tensors[at + 1], &lam = tensors[at + 2], &q = tensors[at + 3];
    const int64_t d_out = w.size(0), r = lam.numel();
    check(w, {d_out, d_in}, "W");
    check(p, {d_out, r}, "P");
    check(lam, {r}, "lam");
    check(q, {r, d_in}, "Q");
    parts.push_back({w, p.contiguous(), lam.contiguous(), q.contiguous(), scalings[i]});
  }
  return parts;
}

// oneDNN's x Wᵀ, plus b (d_out) or ``other`` (n, d_out): an operator of torch's that has no C++ function.
Tensor onednn(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
  const c10::List<std::optional<at::Scalar>> no_scalars;
  c10::Stack stack{rows.contiguous(), weight, bias, "none", no_scalars, c10::IValue()};
  op.callBoxed(stack);
  return stack.back().toTensor();
}

Tensor onednn_plus(const Tensor& rows, const Tensor& weight, const Tensor& other) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "binary");
  c10::Stack stack{rows.contiguous(), other, weight, c10::IValue(), "add"};
  op.callBoxed(stack);
  return stack.back().toTensor();
}

int64_t ranks_of(const std::vector<Part>& parts) {
  int64_t total = 0;
  for (const Part& part : parts) total += part.rank();
  return total;
}

// to (rows, r) = from (rows, r) with its columns times scale (r).
void scale_columns(
    const float* __restrict from, int64_t ldf, int64_t rows, const std::vector<float>& scale, float* __restrict to) {
  const int64_t r = scale.size();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < r; ++k) to[i * r + k] = from[i * ldf + k] * scale[k];
  }
}

// W + P Λ s Q (d_out, d_in), in one pass over W.
Tensor merged(const Part& part) {
  const Tensor& w = part.weight;
  if (w.stride(1) != 1) return at::addmm(w, part.p.mul(part.lam.mul(part.scaling)), part.q);
  Tensor sum = at::empty(w.sizes(), w.options());
  const int64_t d = w.size(1), ldw = w.stride(0), r = part.rank(), threads = at::get_num_threads();
  const float *w0 = numbers(w), *p = numbers(part.p), *q = numbers(part.q);
  float* to = sum.data_ptr<float>();
  const std::vector<float> scale = part.scale();
  std::vector<float> scaled(threads * kBlock * r);
  share_rows(w.size(0), threads, [&](int64_t thread, int64_t from, int64_t end) {
    float* own = scaled.data() + thread * kBlock * r;
    for (int64_t at = from; at < end; at += kBlock) {
      const int64_t m = std::min(kBlock, end - at);
      scale_columns(p + at * r, r, m, scale, own);
      skinny::expand(own, r, m, r, q, d, w0 + at * ldw, ldw, to + at * d, d, d);
    }
  });
  return sum;
}

struct FusedLinear : public torch::autograd::Function<FusedLinear> {
  // tensors: x (..., d_in); what the adapter sees where that is another tensor; the layers'; their biases.
  static variable_list forward(
      AutogradContext* ctx, at::TensorList tensors, std::vector<double> scalings, std::vector<bool> has_bias,
      bool dropped, bool by_onednn) {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const int64_t first = dropped ? 2 : 1;
    const Tensor &x = tensors[0], rows = as_rows(x), seen = dropped ? as_rows(tensors[1]) : rows;
    check(x, x.sizes(), "x");
    if (dropped) check(tensors[1], x.sizes(), "dropped");
    const std::vector<Part> parts = parts_of(tensors, first, scalings, x.size(-1));
    const int64_t n = seen.size(0), d = seen.size(1), total = ranks_of(parts);
    int64_t room = 0;
    for (const Part& part : parts) room += part.rank() * part.outputs();
    Tensor z = at::empty({n, total}, seen.options()), right = at::empty({room}, seen.options());

    // y begins with ``start``: what it holds itself, the bias for every row, or nothing
    struct Output {
      const float *q, *p, *start;
      float* y;
      int64_t lds, column, rank, d;
      std::vector<float> scale;
    };
    std::vector<Output> outputs;
    variable_list outs;
    size_t next_bias = first + kPerLayer * parts.size();
    float* p = right.data_ptr<float>();
    int64_t column = 0, widest = 0;
    auto sizes = x.sizes().vec();
    for (size_t i = 0; i < parts.size(); ++i) {
      const Part& part = parts[i];
      const int64_t r = part.rank(), d_out = part.outputs();
      turn(numbers(part.p), d_out, r, p);
      sizes.back() = d_out;
      const Tensor bias = has_bias[i] ? tensors[next_bias++] : Tensor();
      if (has_bias[i]) check(bias, {d_out}, "b");
      outs.push_back(by_onednn ? onednn(rows, part.weight, bias).view(sizes) : at::empty(sizes, x.options()));
      float* y = outs.back().data_ptr<float>();
      const float* start = by_onednn ? y : has_bias[i] ? numbers(bias) : nullptr;
      outputs.push_back({numbers(part.q), p, start, y, by_onednn ? d_out : 0, column, r, d_out, part.scale()});
      column += r;
      widest = std::max(widest, r);
      p += r * d_out;
    }
    const int64_t threads = at::get_num_threads();
    std::vector<float> scaled(threads * kBlock * widest);
    const float* x0 = numbers(seen);
    float* z0 = z.data_ptr<float>();
    const int64_t ldx = seen.stride(0);
    share_rows(n, threads, [&](int64_t thread, int64_t from, int64_t to) {
      float* own = scaled.data() + thread * kBlock * widest;
      for (int64_t at = from; at < to; at += kBlock) {
        const int64_t m = std::min(kBlock, to - at);
        float* here = z0 + at * total;
        for (const Output& o : outputs) {
          skinny::project(x0 + at * ldx, ldx, m, d, o.q, d, here + o.column, total, o.rank);
          scale_columns(here + o.column, total, m, o.scale, own);
          const float* start = o.start ? o.start + at * o.lds : nullptr;
          skinny::expand(own, o.rank, m, o.rank, o.p, o.d, start, o.lds, o.y + at * o.d, o.d, o.d);
        }
      }
    });
    for (size_t i = 0; i < parts.size() && !by_onednn; ++i) {
      outs[i].view({n, parts[i].outputs()}).addmm_(rows, parts[i].weight.t());
    }

    ctx->set_materialize_grads(false);
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["dropped"] = dropped;
    ctx->saved_data["onednn"] = by_onednn;
    ctx->saved_data["inputs"] = static_cast<int64_t>(tensors.size() + 4);
    variable_list kept(tensors.begin(), tensors.begin() + first + kPerLayer * parts.size());
    kept.insert(kept.end(), {z, right});
    if (dropped) kept[0] = Tensor();  // its shape is that of what was dropped
    ctx->save_for_backward(std::move(kept));
    return outs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto kept = ctx->get_saved_variables();
    const bool dropped = ctx->saved_data["dropped"].toBool();
    const auto scalings = ctx->saved_data["scalings"].toDoubleVector();
    // one gradient for each tensor, and nothing for the four arguments that are none; a bias has none either
    variable_list found(kept.size() - 2);
    if (at::GradMode::is_enabled()) {
      differentiable(ctx, grads, kept, scalings, dropped, found);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      plain(ctx, grads, kept, scalings, dropped, found);
    }
    found.resize(ctx->saved_data["inputs"].toInt());
    return found;
  }

  static void plain(
      AutogradContext* ctx, const variable_list& grads, const variable_list& kept,
      const std::vector<double>& scalings, bool dropped, variable_list& found) {
    const int64_t first = dropped ? 2 : 1;
    const Tensor &input = kept[dropped ? 1 : 0], seen = as_rows(input), &z = kept.end()[-2];
    const std::vector<Part> all = parts_of(kept, first, scalings, input.size(-1));
    int64_t numbers_of_p = 0;
    for (const Part& part : all) numbers_of_p += part.rank() * part.outputs();
    TORCH_CHECK(
        ranks_of(all) == z.size(1) && numbers_of_p == kept.back().numel(),
        "an adapter's rank was changed between a forward pass and its backward pass");
    const bool needs_x = ctx->needs_input_grad(0), needs_dropped = dropped && ctx->needs_input_grad(1);
    const bool expands = dropped ? needs_dropped : needs_x, by_onednn = ctx->saved_data["onednn"].toBool();
    const int64_t n = seen.size(0), d = seen.size(1), of_z = z.size(1);
    const int64_t shares = n / std::max(2 * kBlock, kRowsARank * of_z);
    const int64_t threads = std::clamp<int64_t>(shares, 1, at::get_num_threads());

    // of the layers whose outputs were used
    struct Used {
      Part part;
      std::vector<float> scale;
      int64_t index, column, ldy;
      Tensor grad;
      const float *y, *p;
      float *gb, *glam;
    };
    std::vector<Used> used;
    int64_t total = 0, column = 0, room = 0;
    const float* p = numbers(kept.back());
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t r = all[i].rank(), d_out = all[i].outputs();
      if (grads[i].defined()) {
        Tensor grad = as_rows(grads[i]);
        const float* y = numbers(grad);
        used.push_back({all[i], all[i].scale(), static_cast<int64_t>(first + kPerLayer * i), column, grad.stride(0), grad,
                        y, p, nullptr, nullptr});
        total += r;
        room += threads * r * (d_out + 1);
      }
      column += r;
      p += r * d_out;
    }
    if (used.empty()) return;

    Tensor laid = at::empty({room + total * d * (1 + threads) + threads * kBlock * total}, seen.options());
    float* next = laid.data_ptr<float>();
    const auto take = [&next](int64_t count) { float* taken = next; next += count; return taken; };
    float *q = take(total * d), *gq = take(threads * total * d), *gz = take(threads * kBlock * total), *at_q = q;
    for (Used& u : used) {
      const int64_t r = u.part.rank();
      u.gb = take(threads * r * u.part.outputs());
      u.glam = take(threads * r);
      std::copy_n(numbers(u.part.q), r * d, at_q);
      at_q += r * d;
    }
    // where W is smaller than ∂x, adding the update to a copy of W costs less than a pass over ∂x of its own
    const bool merges = needs_x && !dropped && used.size() == 1 && 2 * used[0].part.outputs() <= n;
    Tensor gx, to_x;
    float* gx0 = nullptr;
    const bool comes_first = needs_x && by_onednn && !merges;
    if (comes_first) {
      for (const Used& u : used) {
        to_x = to_x.defined() ? onednn_plus(u.grad, u.part.weight.t(), to_x) : onednn(u.grad, u.part.weight.t(), {});
      }
    }
    const bool adds = comes_first && !dropped;
    if (expands && !merges) {
      gx = adds ? to_x : at::empty({n, d}, input.options());
      gx0 = gx.data_ptr<float>();
    }
    const float *x0 = numbers(seen), *z0 = numbers(z);
    const int64_t ldx = seen.stride(0);
    share_rows(n, threads, [&](int64_t thread, int64_t from, int64_t to) {
      float *own_gq = gq + thread * total * d, *own_gz = gz + thread * kBlock * total;
      std::fill_n(own_gq, total * d, 0.0f);
      for (const Used& u : used) {
        const int64_t size = u.part.rank() * u.part.outputs();
        std::fill_n(u.gb + thread * size, size, 0.0f);
        std::fill_n(u.glam + thread * u.part.rank(), u.part.rank(), 0.0f);
      }
      for (int64_t at = from; at < to; at += kBlock) {
        const int64_t m = std::min(kBlock, to - at);
        int64_t own = 0;
        for (const Used& u : used) {
          const int64_t r = u.part.rank(), d_out = u.part.outputs();
          const float* y = u.y + at * u.ldy;
          const float* z = z0 + at * of_z + u.column;
          float *here = own_gz + own, *own_glam = u.glam + thread * r;
          skinny::project(y, u.ldy, m, d_out, u.p, d_out, here, total, r);
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t k = 0; k < r; ++k) {
              own_glam[k] += z[i * of_z + k] * here[i * total + k];
              here[i * total + k] *= u.scale[k];
            }
          }
          skinny::outer(z, of_z, y, u.ldy, m, r, d_out, u.gb + thread * r * d_out, d_out);
          own += r;
        }
        // rows far apart are fetched one after the other before they are read across
        const float* x = x0 + at * ldx;
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t k = 0; k < d; k += 16) __builtin_prefetch(x + i * ldx + k, 0, 2);
        }
        skinny::outer(own_gz, total, x, ldx, m, total, d, own_gq, d);
        if (gx0) {
          float* here = gx0 + at * d;
          skinny::expand(own_gz, total, m, total, q, d, adds ? here : nullptr, d, here, d, d);
        }
      }
    });
    for (int64_t t = 1; t < threads; ++t) {
      for (int64_t k = 0; k < total * d; ++k) gq[k] += gq[t * total * d + k];
    }
    for (const Used& u : used) {
      const int64_t r = u.part.rank(), d_out = u.part.outputs();
      for (int64_t t = 1; t < threads; ++t) {
        for (int64_t k = 0; k < r * d_out; ++k) u.gb[k] += u.gb[t * r * d_out + k];
      }
      Tensor gp = at::empty_like(u.part.p), glam = at::zeros_like(u.part.lam), own_gq = at::empty_like(u.part.q);
      turn_back(u.gb, d_out, r, u.scale.data(), gp.data_ptr<float>());
      float* to_lam = glam.data_ptr<float>();
      for (int64_t k = 0; k < r; ++k) {
        for (int64_t t = 0; t < threads; ++t) to_lam[k] += u.glam[t * r + k];
        to_lam[k] *= static_cast<float>(u.part.scaling);
      }
      std::copy_n(gq, r * d, own_gq.data_ptr<float>());
      gq += r * d;
      found[u.index + 1] = gp;
      found[u.index + 2] = glam;
      found[u.index + 3] = own_gq;
    }
    if (needs_dropped) found[1] = gx.view(input.sizes());
    if (needs_x && !comes_first) {
      bool begun = gx.defined() && !dropped;
      to_x = begun ? gx : merges && by_onednn ? Tensor() : at::empty({n, d}, input.options());
      for (const Used& u : used) {
        if (begun) {
          to_x.addmm_(u.grad, u.part.weight);
        } else if (by_onednn) {
          to_x = onednn(u.grad, merged(u.part).t(), {});
        } else {
          at::mm_out(to_x, u.grad, merges ? merged(u.part) : u.part.weight);
        }
        begun = true;
      }
    }
    if (needs_x) found[0] = to_x.view(input.sizes());
  }

  // for second derivatives: the formula, from what has a history
  static void differentiable(
      AutogradContext* ctx, const variable_list& grads, const variable_list& kept,
      const std::vector<double>& scalings, bool dropped, variable_list& found) {
    const int64_t first = dropped ? 2 : 1;
    const Tensor& input = kept[dropped ? 1 : 0];
    const Tensor seen = input.reshape({-1, input.size(-1)});
    for (size_t i = 0; i < scalings.size(); ++i) {
      if (!grads[i].defined()) continue;
      const auto at = first + kPerLayer * i;
      const Tensor &p = kept[at + 1], &q = kept[at + 3], scale = kept[at + 2].mul(scalings[i]);
      const Tensor grad = grads[i].reshape({-1, grads[i].size(-1)});
      const Tensor gb = grad.t().mm(seen.mm(q.t())), gz = grad.mm(p.mul(scale));
      found[at + 1] = gb.mul(scale);
      found[at + 2] = gb.mul(p).sum(0).mul(scalings[i]);
      found[at + 3] = gz.t().mm(seen);
      const Tensor through = grad.mm(kept[at]).view(input.sizes()), update = gz.mm(q).view(input.sizes());
      const Tensor to_x = dropped ? through : through.add(update);
      found[0] = found[0].defined() ? found[0].add(to_x) : to_x;
      if (dropped) found[1] = update;
    }
  }
};

// For each layer: W, b or none, P, lam, Q.
std::vector<Tensor> fused_linear(
    const Tensor& x, const std::optional<Tensor>& dropped, const c10::List<std::optional<Tensor>>& layers,
    c10::ArrayRef<double> scalings, bool onednn) {
  std::vector<Tensor> tensors{x}, biases;
  std::vector<bool> has_bias;
  if (dropped) tensors.push_back(*dropped);
  for (size_t i = 0; i < scalings.size(); ++i) {
    for (const int64_t k : {0, 2, 3, 4}) tensors.push_back(*layers.get(5 * i + k));
    const std::optional<Tensor> bias = layers.get(5 * i + 1);
    has_bias.push_back(bias.has_value());
    if (bias) biases.push_back(bias->contiguous());
  }
  tensors.insert(tensors.end(), biases.begin(), biases.end());
  return FusedLinear::apply(at::TensorList(tensors), scalings.vec(), has_bias, dropped.has_value(), onednn);
}

TORCH_LIBRARY(rankalloc, library) {
  library.def("fused_linear(Tensor x, Tensor? dropped, Tensor?[] layers, float[] scalings, bool onednn) -> Tensor[]");
  library.impl("fused_linear", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(fused_linear));
}

}  // namespace
}  // namespace rankalloc
