// CPU operator of GTPO's conflict tokens: how far each completion runs, from its first trained
// token and back from its last one, along tokens that another completion of its group with an
// advantage of the other sign has at the same position.
#include "../common/checks.h"

namespace reasonkern {
namespace cpu {
namespace {

struct Completions {
  const int64_t* tokens;   // (rows, width), row stride `stride`
  const bool* mask;        // (rows, width)
  const int64_t* sign;     // (rows) of the advantage
  const int64_t* members;  // (rows) in order of their group
  const int64_t* spans;    // (rows, 4) range of the group in `members`, range of trained columns
  int64_t rows, width, stride;

  int64_t length(int64_t row) const { return spans[4 * row + 3] - spans[4 * row + 2]; }
  // Column of a position counted from the first trained token, or from the last one.
  int64_t column(int64_t row, int64_t position, bool backward) const {
    return backward ? spans[4 * row + 3] - 1 - position : spans[4 * row + 2] + position;
  }
};

bool conflicts(const Completions& c, int64_t row, int64_t position, bool backward) {
  const int64_t column = c.column(row, position, backward);
  if (!c.mask[row * c.width + column]) return false;
  const int64_t token = c.tokens[row * c.stride + column];
  for (int64_t at = c.spans[4 * row]; at < c.spans[4 * row + 1]; ++at) {
    const int64_t other = c.members[at];
    if (c.sign[other] * c.sign[row] >= 0 || position >= c.length(other)) continue;
    const int64_t there = c.column(other, position, backward);
    if (c.tokens[other * c.stride + there] == token && c.mask[other * c.width + there]) return true;
  }
  return false;
}

int64_t run_length(const Completions& c, int64_t row, bool backward) {
  int64_t run = 0;
  while (run < c.length(row) && conflicts(c, row, run, backward)) ++run;
  return run;
}

void check_layout(const Completions& c) {
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t* s = c.spans + 4 * row;
    STD_TORCH_CHECK(
        0 <= s[0] && s[0] <= s[1] && s[1] <= c.rows && 0 <= s[2] && s[2] <= s[3] && s[3] <= c.width,
        "spans: expected ranges within (", c.rows, ", ", c.width, "), got (", s[0], ", ", s[1],
        ", ", s[2], ", ", s[3], ") for row ", row);
    STD_TORCH_CHECK(0 <= c.members[row] && c.members[row] < c.rows, "members: expected rows below ",
                    c.rows, ", got ", c.members[row]);
  }
}

Tensor conflict_runs(const Tensor& tokens, const Tensor& mask, const Tensor& sign,
                     const Tensor& members, const Tensor& spans) {
  check_dtype(tokens, "tokens", ScalarType::Long);
  STD_TORCH_CHECK(tokens.dim() == 2, "tokens: expected shape (B, T), got ",
                  shape_text(tokens.sizes()));
  const int64_t rows = tokens.size(0), width = tokens.size(1);
  check_last_contiguous(tokens, "tokens");
  check_tensor(mask, "mask", ScalarType::Bool, tokens.sizes(), tokens);
  check_tensor(sign, "sign", ScalarType::Long, {rows}, tokens);
  check_tensor(members, "members", ScalarType::Long, {rows}, tokens);
  check_tensor(spans, "spans", ScalarType::Long, {rows, 4}, tokens);
  const Completions c{tokens.const_data_ptr<int64_t>(),
                      mask.const_data_ptr<bool>(),
                      sign.const_data_ptr<int64_t>(),
                      members.const_data_ptr<int64_t>(),
                      spans.const_data_ptr<int64_t>(),
                      rows,
                      width,
                      tokens.stride(0)};
  check_layout(c);
  Tensor runs = torch::stable::new_empty(tokens, {rows, 2});
  int64_t* out = runs.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out[2 * row] = run_length(c, row, false);
      out[2 * row + 1] = run_length(c, row, true);
    }
  });
  return runs;
}

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  m.impl("conflict_runs", TORCH_BOX(&reasonkern::cpu::conflict_runs));
}
