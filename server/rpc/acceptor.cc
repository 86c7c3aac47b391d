#include "server/rpc/acceptor.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/base/log.h"

namespace tern::rpc {
namespace {

constexpr int kReserve = 256;
// Between attempts while accept() fails: descriptors come back when clients go.
constexpr int kPauseMs = 50;
constexpr std::chrono::seconds kWarnEvery(10);

int DescriptorLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return INT_MAX;
  return static_cast<int>(std::min<rlim_t>(limit.rlim_cur, INT_MAX));
}

// A listening socket, or -1 with errno.
int ListenOn(const addrinfo& address) {
  const int fd = ::socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int one = 1, zero = 0;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  // Accepted sockets inherit it; a reply must not wait for the acknowledgement of the last.
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  if (address.ai_family == AF_INET6) {
    ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));  // as gRPC listens on [::]
  }
  if (::bind(fd, address.ai_addr, address.ai_addrlen) == 0 && ::listen(fd, SOMAXCONN) == 0) {
    return fd;
  }
  const int reason = errno;
  ::close(fd);
  errno = reason;
  return -1;
}

int PortOf(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                   : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Acceptor>> Acceptor::Listen(AcceptorOptions options,
                                                           grpc::ServerBuilder& builder) {
  const auto failed = [&](absl::string_view why) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.host, ":", options.port, ": ", why));
  };
  absl::string_view host = options.host;
  if (absl::ConsumePrefix(&host, "[")) absl::ConsumeSuffix(&host, "]");
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      ::getaddrinfo(std::string(host).c_str(), absl::StrCat(options.port).c_str(), &hints, &found);
  if (error != 0) return failed(::gai_strerror(error));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> addresses(found, &::freeaddrinfo);

  std::unique_ptr<Acceptor> acceptor(new Acceptor);
  for (const addrinfo* a = found; a != nullptr && acceptor->socket_ < 0; a = a->ai_next) {
    acceptor->socket_ = ListenOn(*a);
  }
  if (acceptor->socket_ < 0) return failed(std::strerror(errno));
  acceptor->port_ = PortOf(acceptor->socket_);
  acceptor->wake_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (acceptor->port_ == 0 || acceptor->wake_ < 0) return failed(std::strerror(errno));
  acceptor->server_ = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, options.credentials);
  if (options.max_descriptor == 0) {
    const int limit = DescriptorLimit();
    options.max_descriptor = limit - std::min(kReserve, limit / 4);
  }
  acceptor->options_ = std::move(options);
  return acceptor;
}

Acceptor::~Acceptor() {
  Stop();
  if (wake_ >= 0) ::close(wake_);
}

void Acceptor::Start() {
  thread_ = std::thread([this] { Run(); });
}

void Acceptor::Stop() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(wake_, &one, sizeof(one));
    thread_.join();
  }
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

void Acceptor::Run() {
  bool failing = false;
  // Under attack every accept may end like that, or every second one.
  using Clock = std::chrono::steady_clock;
  Clock::time_point quiet_until = Clock::now();
  const auto warn = [&](const std::string& what) {
    if (Clock::now() < quiet_until) return;
    quiet_until = Clock::now() + kWarnEvery;
    TERN_LOG_WARN("port {}: {}", port_, what);
  };
  for (;;) {
    pollfd fds[] = {{wake_, POLLIN, 0}, {socket_, POLLIN, 0}};
    // While accept() fails the socket stays readable: the wake-up alone is waited for.
    ::poll(fds, failing ? 1 : 2, failing ? kPauseMs : -1);
    if (fds[0].revents != 0) return;
    const int fd = ::accept4(socket_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      const bool transient = errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
      if (!transient && !failing) {
        warn(absl::StrCat("accept: ", std::strerror(errno), "; trying again"));
      }
      failing = !transient;
      continue;
    }
    failing = false;
    if (fd >= options_.max_descriptor) {
      warn("too many connections; new ones are refused");
      ::close(fd);
      if (options_.refused) options_.refused();
      continue;
    }
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
    connection.listener_fd = socket_;
    connection.fd = fd;
    server_->HandleNewConnection(&connection);  // owns fd from here
  }
}

int RaiseDescriptorLimit(int wanted) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return 0;
  const rlim_t target = std::min(static_cast<rlim_t>(wanted), limit.rlim_max);
  if (target > limit.rlim_cur) {
    limit.rlim_cur = target;
    ::setrlimit(RLIMIT_NOFILE, &limit);
  }
  return DescriptorLimit();
}

}  // namespace tern::rpc
