// A client of bytes: what is written and read is in the test, no library between.
#ifndef TERN_TESTS_HTTP_CLIENT_H_
#define TERN_TESTS_HTTP_CLIENT_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <utility>

namespace tern::testing {

class Connection {
 public:
  explicit Connection(int port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~Connection() { close(fd_); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // False once the peer is gone.
  bool Send(const std::string& bytes) {
    size_t sent = 0;
    while (sent < bytes.size()) {
      const ssize_t n = send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (n <= 0) return false;
      sent += static_cast<size_t>(n);
    }
    return true;
  }
  // What comes until the peer closes, waiting for it.
  std::string ReadAll() {
    while (Receive()) {
    }
    return std::exchange(buffer_, "");
  }
  // One answer: head and as many bytes as its Content-Length says. "" if the peer closes before.
  std::string ReadOne() {
    size_t end;
    while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
      if (!Receive()) return "";
    }
    size_t length = 0;
    const size_t field = buffer_.find("Content-Length: ");
    if (field < end) length = std::strtoull(buffer_.c_str() + field + 16, nullptr, 10);
    while (buffer_.size() < end + 4 + length) {
      if (!Receive()) return "";
    }
    std::string answer = buffer_.substr(0, end + 4 + length);
    buffer_.erase(0, answer.size());
    return answer;
  }

 private:
  bool Receive() {
    char bytes[65536];
    const ssize_t n = recv(fd_, bytes, sizeof(bytes), 0);
    if (n > 0) buffer_.append(bytes, static_cast<size_t>(n));
    return n > 0;
  }

  int fd_;
  std::string buffer_;
};

// The parts of one answer.
struct Answer {
  explicit Answer(const std::string& bytes) {
    const size_t end = bytes.find("\r\n\r\n");
    if (bytes.compare(0, 9, "HTTP/1.1 ") != 0 || end == std::string::npos) return;
    status = std::atoi(bytes.c_str() + 9);
    head = bytes.substr(0, end + 2);
    body = bytes.substr(end + 4);
  }
  // "" if there is none.
  std::string Header(const std::string& name) const {
    const size_t at = head.find("\r\n" + name + ": ");
    if (at == std::string::npos) return "";
    const size_t from = at + name.size() + 4;
    return head.substr(from, head.find("\r\n", from) - from);
  }

  int status = 0;
  std::string head, body;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_HTTP_CLIENT_H_
