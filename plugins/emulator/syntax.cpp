#include "syntax.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <sstream>

namespace emulator {
namespace {

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

int bytes_of(const std::string& type) {
  if (type == "pred") return 0;
  const int bits = std::atoi(type.c_str() + std::strspn(type.c_str(), "busf"));
  if (bits % 8 != 0 || bits == 0) throw UnsupportedPtx("type ." + type);
  return bits / 8;
}

// Words of a declaration: ".reg .b32 %r<47>" is .reg, .b32, %r, <, 47, >.
std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  for (std::size_t i = 0; i < text.size();) {
    if (std::isspace(static_cast<unsigned char>(text[i]))) {
      ++i;
    } else if (is_word(text[i])) {
      std::size_t end = i + 1;
      while (end < text.size() && is_word(text[end]) && text[end] != '.') ++end;
      result.push_back(text.substr(i, end - i));
      i = end;
    } else {
      result.emplace_back(1, text[i++]);
    }
  }
  return result;
}

std::uint64_t number_of(const std::string& text, bool& is_float) {
  is_float = false;
  const bool negative = text[0] == '-';
  const std::string digits = negative ? text.substr(1) : text;
  if (digits.size() > 2 && digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F') && digits.size() == 10) {
    is_float = true;
    return std::stoull(digits.substr(2), nullptr, 16);
  }
  if (digits.size() == 18 && digits[0] == '0' && (digits[1] == 'd' || digits[1] == 'D'))
    return std::stoull(digits.substr(2), nullptr, 16);
  const std::uint64_t value = std::stoull(digits, nullptr, 0);
  return negative ? -value : value;
}

bool is_number(const std::string& text) {
  const std::size_t first = text[0] == '-' ? 1 : 0;
  return first < text.size() && std::isdigit(static_cast<unsigned char>(text[first]));
}

// Splits at top-level commas.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> result;
  int depth = 0;
  std::string part;
  for (const char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) {
      result.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) result.push_back(trimmed(part));
  return result;
}

class Parser {
 public:
  explicit Parser(const std::string& ptx) : ptx_(ptx) {}

  ModuleText run() {
    while (next_line_directive() || step()) {
    }
    // Names of files come last.
    for (KernelText& kernel : module_.kernels) {
      for (Statement& statement : kernel.statements) {
        const std::size_t colon = statement.place.find(':');
        if (colon == std::string::npos) continue;
        const auto file = files_.find(std::stoi(statement.place));
        if (file != files_.end()) statement.place = file->second + statement.place.substr(colon);
      }
    }
    return std::move(module_);
  }

 private:
  const std::string& ptx_;
  ModuleText module_;
  KernelText* kernel_ = nullptr;
  std::size_t at_ = 0;
  std::string buffer_;
  int tuple_ = 0;  // depth of braces inside a statement
  int line_ = 1;
  std::pair<int, int> place_{0, 0};  // file and line of the source; 0: unknown
  std::map<int, std::string> files_;
  std::vector<int> scopes_;  // numbers of the open scopes
  int scope_count_ = 0;

  // Comments and directives that end with their line.
  bool next_line_directive() {
    while (at_ < ptx_.size()) {
      const char c = ptx_[at_];
      if (c == '\n') ++line_;
      if (std::isspace(static_cast<unsigned char>(c))) {
        if (!buffer_.empty()) buffer_ += ' ';
        ++at_;
      } else if (ptx_.compare(at_, 2, "//") == 0) {
        at_ = std::min(ptx_.find('\n', at_), ptx_.size());
      } else if (starts(".version") || starts(".target") || starts(".address_size") || starts(".file") ||
                 starts(".loc ") || starts(".loc\t") || starts(".section")) {
        const std::size_t end = std::min(ptx_.find('\n', at_), ptx_.size());
        place(ptx_.substr(at_, end - at_));
        at_ = end;
      } else {
        return false;
      }
    }
    return false;
  }

  // Where the source of what follows is.
  void place(const std::string& text) {
    int file = 0, line = 0;
    const std::size_t quote = text.find('"');
    if (std::sscanf(text.c_str(), ".file %d", &file) == 1 && quote != std::string::npos) {
      const std::string path = text.substr(quote + 1, text.rfind('"') - quote - 1);
      files_[file] = path.substr(path.rfind('/') + 1);
    } else if (std::sscanf(text.c_str(), ".loc %d %d", &file, &line) == 2 && line > 0) {
      place_ = {file, line};
    }
  }

  bool starts(const char* word) const { return buffer_.empty() && ptx_.compare(at_, std::strlen(word), word) == 0; }

  // One character of a statement, or its end.
  bool step() {
    if (at_ >= ptx_.size()) return false;
    const char c = ptx_[at_++];
    const bool fresh = buffer_.empty();
    if (c == '{' && fresh && kernel_ != nullptr) {
      scopes_.push_back(++scope_count_);
    } else if (c == '{' && kernel_ == nullptr && buffer_.find(".entry") != std::string::npos) {
      begin_kernel();
    } else if (c == '{') {
      ++tuple_;
      buffer_ += c;
    } else if (c == '}' && tuple_ > 0) {
      --tuple_;
      buffer_ += c;
    } else if (c == '}') {
      if (kernel_ == nullptr) throw UnsupportedPtx("unbalanced braces");
      if (scopes_.empty()) {
        kernel_ = nullptr;
      } else {
        scopes_.pop_back();
      }
    } else if (c == ';') {
      statement(trimmed(buffer_));
      buffer_.clear();
    } else if (c == ':' && kernel_ != nullptr && ptx_[at_] != ':' && ptx_[at_ - 2] != ':' && is_label()) {
      kernel_->labels[trimmed(buffer_)] = static_cast<int>(kernel_->statements.size());
      buffer_.clear();
    } else {
      buffer_ += c;
    }
    return true;
  }

  bool is_label() const {
    const std::string text = trimmed(buffer_);
    return !text.empty() && std::all_of(text.begin(), text.end(), is_word);
  }

  void begin_kernel() {
    const std::size_t entry = buffer_.find(".entry");
    const std::size_t open = buffer_.find('(', entry), close = buffer_.rfind(')');
    KernelText kernel;
    kernel.name = trimmed(buffer_.substr(entry + 6, std::min(open, buffer_.size()) - entry - 6));
    if (open != std::string::npos) {
      for (const std::string& text : split(buffer_.substr(open + 1, close - open - 1)))
        kernel.parameters.push_back(variable(text));
    }
    buffer_.clear();
    module_.kernels.push_back(std::move(kernel));
    kernel_ = &module_.kernels.back();
  }

  // ".shared .align 16 .b8 name[64]", ".param .u64 name", ".global .align 4 .b32 name[2] = {1, 2}".
  static Variable variable(const std::string& text) {
    Variable result;
    const std::size_t equals = text.find('=');
    const std::vector<std::string> parts = words(text.substr(0, equals));
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const std::string& word = parts[i];
      if (word == ".align") {
        result.align = std::stoi(parts.at(++i));
      } else if (word[0] == '.' && std::strchr("busf", word[1]) != nullptr && word.size() > 2 &&
                 std::isdigit(static_cast<unsigned char>(word[2]))) {
        result.element = bytes_of(word.substr(1));
        result.bytes = result.element;
        result.align = std::max(result.align, result.element);
      } else if (word == "[") {
        result.bytes = parts.at(i + 1) == "]" ? 0 : result.element * std::stoll(parts[i + 1]);
        i += result.bytes == 0 ? 1 : 2;
      } else if (word[0] != '.') {
        result.name = word;
      }
    }
    if (equals != std::string::npos) {
      std::string list = text.substr(equals + 1);
      std::replace_if(list.begin(), list.end(), [](char c) { return c == '{' || c == '}'; }, ' ');
      bool is_float;
      for (const std::string& item : split(list)) result.values.push_back(number_of(item, is_float));
    }
    return result;
  }

  std::string scoped(const std::string& name, int scope) const {
    return scope == 0 ? name : name + "@" + std::to_string(scope);
  }

  // A register's name in the innermost scope that has it.
  std::string resolved(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (kernel_->registers.count(scoped(name, *scope)) != 0) return scoped(name, *scope);
    }
    return name;
  }

  void declare_registers(const std::string& text) {
    const std::vector<std::string> parts = words(text);
    const int bytes = bytes_of(parts.at(1).substr(1)), scope = scopes_.empty() ? 0 : scopes_.back();
    for (std::size_t i = 2; i < parts.size(); ++i) {
      if (parts[i] == ",") continue;
      if (i + 1 < parts.size() && parts[i + 1] == "<") {
        const int count = std::stoi(parts.at(i + 2));
        for (int n = 0; n < count; ++n) kernel_->registers[scoped(parts[i] + std::to_string(n), scope)] = {bytes};
        i += 3;
      } else {
        kernel_->registers[scoped(parts[i], scope)] = {bytes};
      }
    }
  }

  void statement(const std::string& text) {
    if (text.empty() || text.rfind(".pragma", 0) == 0) return;
    if (kernel_ == nullptr) {
      const Variable declared = variable(text);
      if (text.find(".shared") != std::string::npos) {
        module_.shared.push_back(declared);
      } else if (text.find(".global") != std::string::npos || text.find(".const") != std::string::npos) {
        module_.constants.push_back(declared);
      } else {
        throw UnsupportedPtx("declaration: " + text);
      }
    } else if (text.rfind(".reg", 0) == 0) {
      declare_registers(text);
    } else if (text.rfind(".shared", 0) == 0) {
      kernel_->shared.push_back(variable(text));
    } else if (text.rfind(".local", 0) == 0) {
      kernel_->local.push_back(variable(text));
    } else {
      kernel_->statements.push_back(instruction(text));
    }
  }

  Statement instruction(const std::string& text) const {
    Statement result;
    result.text = text;
    result.place = place_.second == 0 ? "PTX line " + std::to_string(line_)
                                      : std::to_string(place_.first) + ':' + std::to_string(place_.second);
    std::string rest = text;
    if (rest[0] == '@') {
      const std::size_t end = rest.find_first_of(" \t");
      result.guard_negated = rest[1] == '!';
      result.guard = resolved(rest.substr(result.guard_negated ? 2 : 1, end - (result.guard_negated ? 2 : 1)));
      rest = trimmed(rest.substr(end));
    }
    const std::size_t end = std::min(rest.find_first_of(" \t"), rest.size());
    std::istringstream dotted(rest.substr(0, end));
    std::getline(dotted, result.opcode, '.');
    for (std::string part; std::getline(dotted, part, '.');) result.parts.push_back(part);
    for (const std::string& part : split(rest.substr(end))) result.arguments.push_back(argument(part));
    return result;
  }

  Argument argument(const std::string& text) const {
    Argument result;
    if (text[0] == '{') {
      result.kind = Argument::Kind::tuple;
      for (const std::string& part : split(text.substr(1, text.rfind('}') - 1))) result.items.push_back(argument(part));
      return result;
    }
    if (text[0] == '[') {
      result.kind = Argument::Kind::memory;
      set_base(result, trimmed(text.substr(1, text.rfind(']') - 1)));
      return result;
    }
    if (is_number(text)) {
      result.kind = Argument::Kind::number;
      result.number = number_of(text, result.is_float);
      return result;
    }
    const std::size_t bar = text.find('|');
    if (bar != std::string::npos) {
      result = argument(trimmed(text.substr(0, bar)));
      result.items.push_back(argument(trimmed(text.substr(bar + 1))));
      return result;
    }
    result.negated = text[0] == '!';
    set_base(result, trimmed(text.substr(result.negated ? 1 : 0)));
    return result;
  }

  // "name", "name+8", "name+-8", "64".
  void set_base(Argument& result, const std::string& text) const {
    const std::size_t plus = text.find('+');
    const std::string base = trimmed(text.substr(0, plus));
    bool is_float;
    if (plus != std::string::npos) {
      result.offset = static_cast<std::int64_t>(number_of(trimmed(text.substr(plus + 1)), is_float));
    }
    if (is_number(base)) {
      result.offset += static_cast<std::int64_t>(number_of(base, is_float));
    } else {
      result.name = resolved(base);
    }
  }
};

}  // namespace

std::string Statement::full_name() const {
  std::string result = opcode;
  for (const std::string& part : parts) result += "." + part;
  return result;
}

bool Statement::has(const char* part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

ModuleText parse(const std::string& ptx) { return Parser(ptx).run(); }

}  // namespace emulator
